"""Multi-head latent attention over its compressed cache (DeepSeek-V2, arXiv 2405.04434, section 2.1).

Published weights make each head's keys and values from a token's latent: key = U_h latent, value = V_h latent. Here the
latent itself is cached, and since q . (U_h l) = (U_h^T q) . l and sum(p V_h l) = V_h sum(p l), the query is taken into
the latent's space before attention and the result out of it afterwards. So all heads share one key of Z + P columns,
and its first Z are the value: multi-query attention.

T tokens, C model width, H heads, Z the latent's width, P rotated columns, N columns not rotated, Dv value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.decoder import ops
from workers.decoder.attention import AttentionMetadata, KVPool
from workers.decoder.config import LatentAttentionConfig
from workers.decoder.norm import Norm
from workers.decoder.tensors import Tensors
from workers.decoder.weight import ExpertBank, Weight


class LatentAttention:
    def __init__(
        self,
        config: LatentAttentionConfig,
        *,
        query_down: Weight | None,
        query_down_bias: Tensor | None,
        query_norm: Norm | None,
        query: Weight,
        latent: Weight,
        latent_bias: Tensor | None,
        latent_norm: Norm,
        into_latent: ExpertBank,
        out_of_latent: ExpertBank,
        output: Weight,
        output_bias: Tensor | None,
    ) -> None:
        self.config = config
        self.query_down = query_down  # [query_rank, C]
        self.query_down_bias = query_down_bias
        self.query_norm = query_norm
        self.query = query  # [H * (N + P), query_rank or C]
        self.latent = latent  # [Z + P, C]
        self.latent_bias = latent_bias
        self.latent_norm = latent_norm
        self.into_latent = into_latent  # a slot for each head: [Z, N]
        self.out_of_latent = out_of_latent  # a slot for each head: [Dv, Z]
        self.output = output  # [C, H * Dv]
        self.output_bias = output_bias

    @classmethod
    def load(cls, config: LatentAttentionConfig, hidden_width: int, tensors: Tensors) -> LatentAttention:
        spec, rank = config.spec, config.query_rank
        heads = range(spec.num_heads)
        into_latent = ops.new_bank(
            heads, spec.value_width, config.plain_width, dtype=tensors.dtype, device=tensors.device
        )
        out_of_latent = ops.new_bank(
            heads, config.head_value_width, spec.value_width, dtype=tensors.dtype, device=tensors.device
        )
        for head in heads:
            own = tensors.under(f"heads.{head}")
            into_latent.put(head, 0, own.matrix("into_latent.weight", spec.value_width, config.plain_width))
            out_of_latent.put(head, 0, own.matrix("out_of_latent.weight", config.head_value_width, spec.value_width))
        query_width = spec.num_heads * (config.plain_width + config.rotary.width)
        return cls(
            config,
            query_down=None if rank is None else tensors.weight(hidden_width, ("query_down.weight", rank)),
            query_down_bias=tensors.vector("query_down.bias", rank) if config.bias and rank is not None else None,
            query_norm=None if rank is None else Norm.load(config.latent_norm, rank, tensors.under("query_norm")),
            query=tensors.weight(rank or hidden_width, ("query.weight", query_width)),
            latent=tensors.weight(hidden_width, ("latent.weight", spec.head_width)),
            latent_bias=tensors.vector("latent.bias", spec.head_width) if config.bias else None,
            latent_norm=Norm.load(config.latent_norm, spec.value_width, tensors.under("latent_norm")),
            into_latent=into_latent,
            out_of_latent=out_of_latent,
            output=tensors.weight(spec.num_heads * config.head_value_width, ("output.weight", hidden_width)),
            output_bias=tensors.vector("output.bias", hidden_width) if config.bias else None,
        )

    def __call__(
        self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, pool: KVPool, metadata: AttentionMetadata
    ) -> Tensor:
        """x [T, C] -> [T, C]. The step's latents and shared keys are written to the pool first.

        rotation: cosine and sine [T, P / 2] of the tokens' positions.
        """
        assert rotation is not None
        config, tokens = self.config, x.shape[0]
        compressed = ops.linear(x, self.latent, self.latent_bias)  # [T, Z + P]
        latent = self.latent_norm(compressed[:, : config.spec.value_width])  # [T, Z]
        shared = ops.rotate(compressed[:, None, config.spec.value_width :], *rotation)  # [T, 1, P]
        pool.write(torch.cat([latent[:, None], shared], dim=-1), None, metadata.slots)

        if self.query_down is not None and self.query_norm is not None:
            x = self.query_norm(ops.linear(x, self.query_down, self.query_down_bias))
        width = config.plain_width + config.rotary.width
        query = ops.linear(x, self.query).view(tokens, config.spec.num_heads, width)  # [T, H, N + P]
        plain = _by_head(query[..., : config.plain_width], self.into_latent)  # [T, H, Z]
        rotated = ops.rotate(query[..., config.plain_width :], *rotation)  # [T, H, P]
        attended = ops.paged_attention(torch.cat([plain, rotated], dim=-1), pool, metadata)  # [T, H, Z]
        values = _by_head(attended, self.out_of_latent)  # [T, H, Dv]
        return ops.linear(values.flatten(1), self.output, self.output_bias)


def _by_head(x: Tensor, bank: ExpertBank) -> Tensor:
    """x [T, H, in], each head's columns times its own slot's matrix [out, in] -> [T, H, out]."""
    tokens, heads, width = x.shape
    rows = torch.full((heads,), tokens, dtype=torch.int64)
    out = ops.grouped_linear(x.transpose(0, 1).reshape(heads * tokens, width), bank, rows)
    return out.view(heads, tokens, bank.out_features).transpose(0, 1)
