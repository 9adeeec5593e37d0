"""A layer's attention: projections, rotation, cache, and what the heads return.

T tokens, C model width, H query heads, K key-value heads, D head width, Dv value width.
"""

from __future__ import annotations

from torch import Tensor

from workers.decoder import ops
from workers.decoder.attention import AttentionMetadata, KVPool
from workers.decoder.config import AttentionConfig
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
    ) -> None:
        self.config = config
        self.qkv = qkv  # [(H + K) * D + K * Dv, C]
        self.qkv_bias = qkv_bias
        self.output = output  # [C, H * Dv]
        self.output_bias = output_bias

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
        return cls(
            config,
            tensors.weight(hidden_width, *weights),
            tensors.vectors(*biases) if config.qkv_bias else None,
            tensors.weight(spec.num_heads * spec.value_width, ("output.weight", hidden_width)),
            tensors.vector("output.bias", hidden_width) if config.output_bias else None,
        )

    def __call__(
        self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, pool: KVPool, metadata: AttentionMetadata
    ) -> Tensor:
        """x [T, C] -> [T, C]. The step's keys and values are written to the pool first.

        rotation: cosine and sine [T, D / 2] of the tokens' positions, for models that rotate.
        """
        spec = self.config.spec
        heads, kv_heads, width = spec.num_heads, spec.num_kv_heads, spec.head_width
        qkv = ops.linear(x, self.qkv, self.qkv_bias)
        tokens = x.shape[0]
        query = qkv[:, : heads * width].view(tokens, heads, width)  # [T, H, D]
        key = qkv[:, heads * width : (heads + kv_heads) * width].view(tokens, kv_heads, width)  # [T, K, D]
        value = qkv[:, (heads + kv_heads) * width :].view(tokens, kv_heads, spec.value_width)  # [T, K, Dv]
        if rotation is not None:
            query, key = ops.rotate(query, *rotation), ops.rotate(key, *rotation)
        pool.write(key, value, metadata.slots)
        attended = ops.paged_attention(query, pool, metadata)  # [T, H, Dv]
        return ops.linear(attended.flatten(1), self.output, self.output_bias)
