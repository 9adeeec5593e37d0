"""One layer of the decoder. T tokens, C model width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from workers.decoder.attention import AttentionMetadata, KVPool
from workers.decoder.config import AttentionConfig, DecoderConfig, ExpertsConfig, LatentAttentionConfig, LayerConfig
from workers.decoder.experts import Experts, RouterListener
from workers.decoder.feedforward import FeedForward
from workers.decoder.latent_attention import LatentAttention
from workers.decoder.norm import Norm
from workers.decoder.self_attention import SelfAttention
from workers.decoder.tensors import Tensors
from workers.parallel.dispatch import Dispatcher


class Attention(Protocol):
    """What a block asks of its attention, of whatever kind."""

    def __call__(
        self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, pool: KVPool, metadata: AttentionMetadata
    ) -> Tensor: ...


class Block:
    def __init__(
        self,
        index: int,
        config: LayerConfig,
        *,
        attention_norm: Norm,
        attention: Attention,
        attention_post_norm: Norm | None,
        feed_forward_norm: Norm,
        feed_forward: FeedForward | Experts,
        feed_forward_post_norm: Norm | None,
    ) -> None:
        self.index = index
        self.config = config
        self.attention_norm = attention_norm
        self.attention = attention
        self.attention_post_norm = attention_post_norm
        self.feed_forward_norm = feed_forward_norm  # the attention's own where both share one
        self.feed_forward = feed_forward
        self.feed_forward_post_norm = feed_forward_post_norm

    @classmethod
    def load(cls, index: int, config: DecoderConfig, tensors: Tensors, held: Sequence[int] | None = None) -> Block:
        """Layer `index` of a decoder, from all of its `tensors`. `held`: the expert of each slot; None: all of them."""
        layer, width = config.layers[index], config.hidden_width
        own = tensors.under(f"layers.{index}")
        inner = own.under("feed_forward")

        def norm(name: str) -> Norm:
            return Norm.load(layer.norm, width, own.under(name))

        attention_norm = norm("attention_norm")
        sandwich = layer.arrangement == "sandwich"
        return cls(
            index,
            layer,
            attention_norm=attention_norm,
            attention=_load_attention(layer.attention, width, own.under("attention")),
            attention_post_norm=norm("attention_post_norm") if sandwich else None,
            feed_forward_norm=attention_norm if layer.arrangement == "parallel_shared" else norm("feed_forward_norm"),
            feed_forward=Experts.load(layer.feed_forward, width, inner, held)
            if isinstance(layer.feed_forward, ExpertsConfig)
            else FeedForward.load(layer.feed_forward, width, inner),
            feed_forward_post_norm=norm("feed_forward_post_norm") if sandwich else None,
        )

    def __call__(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        pool: KVPool,
        metadata: AttentionMetadata,
        dispatcher: Dispatcher,
        listener: RouterListener | None = None,
    ) -> Tensor:
        """x [T, C] -> [T, C]. `listener` hears what the router says, if there is one."""
        normed = self.attention_norm(x)
        attended = self.attention(normed, rotation, pool, metadata)
        if self.attention_post_norm is not None:
            attended = self.attention_post_norm(attended)
        after = self._added(x, attended)
        if self.config.arrangement == "parallel_shared":
            inner = normed
        else:
            inner = self.feed_forward_norm(x if self.config.arrangement == "parallel" else after)
        if isinstance(self.feed_forward, Experts):
            forwarded = self.feed_forward(inner, self.index, dispatcher, listener)
        else:
            forwarded = self.feed_forward(inner)
        if self.feed_forward_post_norm is not None:
            forwarded = self.feed_forward_post_norm(forwarded)
        return self._added(after, forwarded)

    def _added(self, x: Tensor, part: Tensor) -> Tensor:
        return x + (part if self.config.residual_scale == 1.0 else part * self.config.residual_scale)


def _load_attention(config: AttentionConfig | LatentAttentionConfig, hidden_width: int, tensors: Tensors) -> Attention:
    if isinstance(config, LatentAttentionConfig):
        return LatentAttention.load(config, hidden_width, tensors)
    return SelfAttention.load(config, hidden_width, tensors)
