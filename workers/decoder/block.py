"""One layer of the decoder. T tokens, C model width."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from workers.decoder.attention import AttentionMetadata, KVPool
from workers.decoder.config import DecoderConfig, ExpertsConfig
from workers.decoder.experts import Experts
from workers.decoder.feedforward import FeedForward
from workers.decoder.norm import Norm
from workers.decoder.self_attention import SelfAttention
from workers.decoder.tensors import Tensors
from workers.parallel.dispatch import Dispatcher


class Block:
    def __init__(
        self,
        index: int,
        attention_norm: Norm,
        attention: SelfAttention,
        feed_forward_norm: Norm,
        feed_forward: FeedForward | Experts,
    ) -> None:
        self.index = index
        self.attention_norm = attention_norm
        self.attention = attention
        self.feed_forward_norm = feed_forward_norm
        self.feed_forward = feed_forward

    @classmethod
    def load(cls, index: int, config: DecoderConfig, tensors: Tensors, held: Sequence[int] | None = None) -> Block:
        """Layer `index` of a decoder, from all of its `tensors`. `held`: the expert of each slot; None: all of them."""
        layer, width = config.layers[index], config.hidden_width
        own = tensors.under(f"layers.{index}")
        inner = own.under("feed_forward")
        return cls(
            index,
            Norm.load(layer.norm, width, own.under("attention_norm")),
            SelfAttention.load(layer.attention, width, own.under("attention")),
            Norm.load(layer.norm, width, own.under("feed_forward_norm")),
            Experts.load(layer.feed_forward, width, inner, held)
            if isinstance(layer.feed_forward, ExpertsConfig)
            else FeedForward.load(layer.feed_forward, width, inner),
        )

    def __call__(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        pool: KVPool,
        metadata: AttentionMetadata,
        dispatcher: Dispatcher,
    ) -> Tensor:
        """x [T, C] -> [T, C]."""
        x = x + self.attention(self.attention_norm(x), rotation, pool, metadata)
        inner = self.feed_forward_norm(x)
        if isinstance(self.feed_forward, Experts):
            return x + self.feed_forward(inner, self.index, dispatcher)
        return x + self.feed_forward(inner)
