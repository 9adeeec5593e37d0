"""A layer's attention: projections, rotation, cache, and what the heads return.

T tokens, C model width, H query heads, K key-value heads, D head width, Dv value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.decoder import ops
from workers.decoder.attention import AttentionMetadata, KVPool
from workers.decoder.config import AttentionConfig
from workers.decoder.norm import Norm
from workers.decoder.tensors import Tensors
from workers.decoder.weight import Weight


class SelfAttention:
    """Multi-head, grouped-query or multi-query attention. Query, key and value come from one product."""

    def __init__(
        self,
        config: AttentionConfig,
        qkv: Weight,
        qkv_bias: Tensor | None,
        output: Weight,
        output_bias: Tensor | None,
        query_norm: Norm | None = None,
        key_norm: Norm | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        self.config = config
        self.qkv = qkv  # [(H + K) * D + K * Dv, C]
        self.qkv_bias = qkv_bias
        self.output = output  # [C, H * Dv]
        self.output_bias = output_bias
        self.query_norm = query_norm  # [D], or [H * D] over the projection
        self.key_norm = key_norm  # [D], or [K * D] over the projection
        self.sinks = sinks  # [H]

    @classmethod
    def load(cls, config: AttentionConfig, hidden_width: int, tensors: Tensors) -> SelfAttention:
        spec = config.spec
        query, key, value = (
            spec.num_heads * spec.head_width,
            spec.num_kv_heads * spec.head_width,
            spec.num_kv_heads * spec.value_width,
        )
        weights = (("query.weight", query), ("key.weight", key), ("value.weight", value))
        biases = (("query.bias", query), ("key.bias", key), ("value.bias", value))
        query_norm = key_norm = None
        if config.query_key_norm is not None:
            over = (spec.head_width, spec.head_width) if config.norm_over == "head" else (query, key)
            query_norm = Norm.load(config.query_key_norm, over[0], tensors.under("query_norm"))
            key_norm = Norm.load(config.query_key_norm, over[1], tensors.under("key_norm"))
        return cls(
            config,
            tensors.weight(hidden_width, *weights),
            tensors.vectors(*biases) if config.qkv_bias else None,
            tensors.weight(spec.num_heads * spec.value_width, ("output.weight", hidden_width)),
            tensors.vector("output.bias", hidden_width) if config.output_bias else None,
            query_norm,
            key_norm,
            tensors.vector("sinks", spec.num_heads) if config.sinks else None,
        )

    def __call__(
        self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, pool: KVPool, metadata: AttentionMetadata
    ) -> Tensor:
        """x [T, C] -> [T, C]. The step's keys and values are written to the pool first.

        rotation: cosine and sine [T, D / 2] of the tokens' positions, for models that rotate.
        """
        spec = self.config.spec
        heads, kv_heads, width = spec.num_heads, spec.num_kv_heads, spec.head_width
        widths = [heads * width, kv_heads * width, kv_heads * spec.value_width]
        query, key, value = torch.split(ops.linear(x, self.qkv, self.qkv_bias), widths, dim=-1)
        per_head = self.config.norm_over == "head"
        if not per_head:
            query, key = self._normed(query, key)
        bound = self.config.clip_qkv
        if bound is not None:
            query, key, value = (part.clamp(-bound, bound) for part in (query, key, value))
        tokens = x.shape[0]
        query = query.view(tokens, heads, width)  # [T, H, D]
        key = key.view(tokens, kv_heads, width)  # [T, K, D]
        value = value.view(tokens, kv_heads, spec.value_width)  # [T, K, Dv]
        if per_head:
            query, key = self._normed(query, key)
        if rotation is not None:
            query, key = ops.rotate(query, *rotation), ops.rotate(key, *rotation)
        pool.write(key, value, metadata.slots)
        attended = ops.paged_attention(query, pool, metadata, self.sinks)  # [T, H, Dv]
        return ops.linear(attended.flatten(1), self.output, self.output_bias)

    def _normed(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        if self.query_norm is None or self.key_norm is None:
            return query, key
        return self.query_norm(query), self.key_norm(key)
