"""The whole decoder: token ids in, hidden states and logits out, over a paged KV cache.

T tokens of a step, N rows of logits, C model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from workers.decoder import ops
from workers.decoder.attention import AttentionMetadata, AttentionSpec, KVPool
from workers.decoder.block import Block
from workers.decoder.checkpoint import Checkpoint, load_checkpoint
from workers.decoder.config import DecoderConfig, ExpertsConfig
from workers.decoder.embedding import Embedding
from workers.decoder.experts import Experts, RouterListener
from workers.decoder.head import Head
from workers.decoder.memory import freed_at_once
from workers.decoder.norm import Norm
from workers.decoder.position import Rotary
from workers.decoder.precision import Precision, resolve_precision
from workers.decoder.tensors import Tensors
from workers.parallel.dispatch import Dispatcher, LocalDispatcher


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGroup:
    """Layers that attend alike: they share a block table, and each block holds the same positions in all of them."""

    spec: AttentionSpec
    layers: tuple[int, ...]


def layer_groups(config: DecoderConfig) -> tuple[LayerGroup, ...]:
    """The groups in the order of their first layers."""
    layers: dict[AttentionSpec, list[int]] = {}
    for index, layer in enumerate(config.layers):
        layers.setdefault(layer.attention.spec, []).append(index)
    return tuple(LayerGroup(spec=spec, layers=tuple(indices)) for spec, indices in layers.items())


def router_width(config: DecoderConfig) -> int:
    """The experts of all layers that have a router."""
    return sum(
        layer.feed_forward.router.num_experts
        for layer in config.layers
        if isinstance(layer.feed_forward, ExpertsConfig)
    )


class Decoder:
    """One rank's decoder. Sequences travel packed, [T, C] without padding, prefill and decode mixed."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        embedding: Embedding,
        blocks: Sequence[Block],
        norm: Norm,
        head: Head | None,
        precision: Precision,
        device: torch.device,
        dispatcher: Dispatcher,
        max_context: int | None = None,
    ) -> None:
        self.config = config
        self.groups = layer_groups(config)
        self.vocab_size = config.vocab_size
        self.hidden_width = config.hidden_width
        self.router_width = router_width(config)
        self.precision = precision
        self.device = device
        self.embedding = embedding
        self.blocks = tuple(blocks)
        self.norm = norm
        self.head = head
        self.dispatcher = dispatcher
        self._group_of = {layer: g for g, group in enumerate(self.groups) for layer in group.layers}
        rotaries = (layer.attention.rotary for layer in config.layers)
        context = min(max_context or config.max_context, config.max_context)
        self._rotaries = {rotary: Rotary(rotary, device, context=context) for rotary in rotaries if rotary is not None}

    @classmethod
    def load(
        cls,
        source: Path | Checkpoint,
        *,
        device: str | torch.device = "cpu",
        dtype: str = "auto",
        experts: Sequence[Sequence[int]] | None = None,
        dispatcher: Dispatcher | None = None,
        max_context: int | None = None,
    ) -> Decoder:
        """Read a checkpoint's weights: a directory in Hugging Face layout, a .gguf file, or one opened before.

        `dtype` is "auto", "float32", "bfloat16" or "int8". The last holds linear layers, experts, embedding and output
        in 8 bits with a scale a row (int8.py), quantized tensor by tensor as they are read; norms, biases, routers and
        position tables stay float32, activations and the KV cache are what "auto" makes them. Measured on SmolLM2-135M,
        the embedding in 8 bits costs 0.12% of perplexity, all else 0.02%; in float32 it would be half of what is held.
        `experts[layer]` names the expert of each slot that this rank holds (None: all); other experts are not read, and
        `dispatcher` must know the same placement. `max_context`: positions that sequences will use at most (None: all
        that the model has), which LongRoPE's frequencies depend on.
        Peak memory: the weights held plus one tensor. UserError when the checkpoint is not whole.
        """
        device = torch.device(device)
        checkpoint = source if isinstance(source, Checkpoint) else load_checkpoint(source)
        config = checkpoint.config
        precision = resolve_precision(dtype, device)
        tensors = Tensors(checkpoint, "", precision.weights, device)
        with freed_at_once():
            embedding = Embedding.load(config, tensors)
            blocks = [
                Block.load(i, config, tensors, None if experts is None else experts[i])
                for i in range(len(config.layers))
            ]
            norm = Norm.load(config.norm, config.hidden_width, tensors.under("norm"))
            head = Head.load(config, embedding.tokens, tensors) if config.has_output else None
        return cls(
            config,
            embedding=embedding,
            blocks=blocks,
            norm=norm,
            head=head,
            precision=precision,
            device=device,
            dispatcher=dispatcher or LocalDispatcher(),
            max_context=max_context,
        )

    def hold(self, checkpoint: Checkpoint, experts: Sequence[Sequence[int]]) -> None:
        """Have the experts that `experts[layer]` names, as `load` takes them, instead of those that were held.

        A layer's are freed before its new ones are read, so peak memory is what is held plus one tensor. The dispatcher
        must know the new placement before the next `forward`. If it raises, the decoder is of no use any more.
        """
        tensors = Tensors(checkpoint, "", self.precision.weights, self.device)
        with freed_at_once():
            for i, block in enumerate(self.blocks):
                if isinstance(block.feed_forward, Experts):
                    own = tensors.under(f"layers.{i}").under("feed_forward")
                    block.feed_forward.hold(experts[i], self.config.hidden_width, own)

    def new_pools(self, num_blocks: Sequence[int], block_tokens: int) -> list[KVPool]:
        """Empty pools, one a layer; `num_blocks` is given a group."""
        return [
            ops.new_pool(
                layer.attention.spec,
                num_blocks[self._group_of[i]],
                block_tokens,
                dtype=self.precision.cache,
                device=self.device,
            )
            for i, layer in enumerate(self.config.layers)
        ]

    def block_bytes(self, group: int, block_tokens: int) -> int:
        """Bytes that one block of a group takes in all of its layers together."""
        spec = self.groups[group].spec
        one = ops.new_pool(spec, 1, block_tokens, dtype=self.precision.cache, device=self.device)
        return one.nbytes * len(self.groups[group].layers)

    @torch.inference_mode()
    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        metadata: Sequence[AttentionMetadata],
        pools: Sequence[KVPool],
        *,
        router_listener: RouterListener | None = None,
    ) -> Tensor:
        """token_ids and positions [T] int64, metadata a group, pools a layer -> hidden [T, C] after the final norm.

        Writes the tokens' keys and values to the pools. T may be 0: a rank without work still joins its gang's
        exchanges. `router_listener` is given each MoE layer's index and router logits [T, E], before the choice.
        """
        x = self.embedding(token_ids, positions, self.precision.activations)  # [T, C]
        rotations = {config: rotary(positions) for config, rotary in self._rotaries.items()}
        for i, block in enumerate(self.blocks):
            rotary = self.config.layers[i].attention.rotary
            rotation = None if rotary is None else rotations[rotary]
            x = block(x, rotation, pools[i], metadata[self._group_of[i]], self.dispatcher, router_listener)
        return self.norm(x)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [N, C] after the final norm -> [N, V] float32. Only where the configuration `has_output`."""
        assert self.head is not None, "who asks for logits was to be refused"
        return self.head(hidden)
