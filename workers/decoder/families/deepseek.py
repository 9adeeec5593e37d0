"""DeepSeek-V2 and V3: latent attention, shared experts and many small ones in groups (arXiv 2405.04434, 2412.19437)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import UserError
from workers.decoder.attention import AttentionSpec
from workers.decoder.config import (
    DecoderConfig,
    ExpertsConfig,
    FeedForwardConfig,
    LatentAttentionConfig,
    LayerConfig,
    NormConfig,
    RouterConfig,
)
from workers.decoder.families import gguf, llama
from workers.decoder.families.arrange import Turned
from workers.decoder.families.document import Document
from workers.decoder.families.expert_names import LLAMA_NAMES, either_sources
from workers.decoder.families.rotary import read_rotary, yarn_magnitude
from workers.decoder.storage import Source

MODEL_TYPES: tuple[str, ...] = ("deepseek_v2", "deepseek_v3")
GGUF_ARCHITECTURES: tuple[str, ...] = ("deepseek2",)

_SOFTMAX, _SIGMOID = 1, 2  # llama.cpp's numbers of router functions
_LATENT_EPS = 1e-6  # of the latents' norms, whatever rms_norm_eps says

# What a configuration leaves out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {
        "first_k_dense_replace": 0,
        "moe_intermediate_size": 1407,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "routed_scaling_factor": 1.0,
        "scoring_func": "softmax",
        "topk_method": "greedy",
    },
    "deepseek_v3": {
        "first_k_dense_replace": 3,
        "moe_intermediate_size": 2048,
        "n_group": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_experts_per_tok": 8,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_group": 4,
        "topk_method": "noaux_tc",
    },
}
_SHARED_DEFAULTS = {
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}


def read_config(document: Document) -> DecoderConfig:
    architecture = document.text("model_type")
    document = document.over(_SHARED_DEFAULTS | _DEFAULTS[architecture])
    document.refuse({"moe_layer_freq": 1})
    activation = document.choice("hidden_act", llama.ACTIVATIONS, "silu")
    width = document.integer("moe_intermediate_size")
    shared = document.optional_integer("n_shared_experts")
    experts = ExpertsConfig(
        router=_read_router(document, sigmoid=architecture == "deepseek_v3"),
        expert=FeedForwardConfig(width=width, activation=activation),
        shared=None if shared is None else FeedForwardConfig(width=width * shared, activation=activation),
    )
    dense = llama.gated_feed_forward(document)
    norm = NormConfig(eps=document.number("rms_norm_eps", 1e-6))
    layer = LayerConfig(attention=_read_attention(document), feed_forward=experts, norm=norm)
    num_layers = document.integer("num_hidden_layers")
    num_dense = min(document.count("first_k_dense_replace"), num_layers)
    return DecoderConfig(
        architecture=architecture,
        vocab_size=document.integer("vocab_size"),
        hidden_width=document.integer("hidden_size"),
        max_context=document.integer("max_position_embeddings"),
        layers=(replace(layer, feed_forward=dense),) * num_dense + (layer,) * (num_layers - num_dense),
        norm=norm,
        tied_embeddings=document.flag("tie_word_embeddings", False),
    )


def _read_attention(document: Document) -> LatentAttentionConfig:
    heads, rank = document.integer("num_attention_heads"), document.integer("kv_lora_rank")
    plain, rotated = document.integer("qk_nope_head_dim"), document.integer("qk_rope_head_dim")
    rotary = read_rotary(document, rotated)
    scale = (plain + rotated) ** -0.5
    if rotary.scaling is not None:
        written = document.inner("rope_parameters" if "rope_parameters" in document else "rope_scaling")
        scale *= yarn_magnitude(rotary.scaling.factor, written.number("mscale_all_dim", 0.0)) ** 2
    return LatentAttentionConfig(
        spec=AttentionSpec(
            num_heads=heads,
            num_kv_heads=1,
            head_width=rank + rotated,
            value_width=rank,
            scale=scale,
            values_in_keys=True,
        ),
        rotary=rotary,
        plain_width=plain,
        head_value_width=document.integer("v_head_dim"),
        query_rank=document.optional_integer("q_lora_rank"),
        latent_norm=NormConfig(eps=_LATENT_EPS),
        interleaved=document.flag("rope_interleave", True),
        bias=document.flag("attention_bias", False),
    )


def _read_router(document: Document, *, sigmoid: bool) -> RouterConfig:
    """V2: softmax, the best group by its best expert. V3: sigmoid with correction, by its two best ones."""
    methods = {"noaux_tc": True} if sigmoid else {"greedy": False, "group_limited_greedy": True}
    grouped = document.choice("topk_method", methods)
    document.choice("scoring_func", {"sigmoid": None} if sigmoid else {"softmax": None})
    renormalise = document.flag("norm_topk_prob", False)
    if renormalise and not sigmoid:
        raise UserError(
            f"{document.where}: norm_topk_prob is not supported for deepseek_v2, whose two references disagree about it"
        )
    return RouterConfig(
        num_experts=document.integer("n_routed_experts"),
        top_k=document.integer("num_experts_per_tok"),
        scores="sigmoid" if sigmoid else "softmax_all",
        renormalise=renormalise,
        scale=document.number("routed_scaling_factor"),
        correction_bias=sigmoid,
        groups=document.integer("n_group") if grouped else 1,
        top_groups=document.integer("topk_group") if grouped else 1,
    )


def sources(config: DecoderConfig, names: Collection[str]) -> dict[str, Source]:
    found = llama.sources(config, names)  # of which attention's names are replaced
    for i, layer in enumerate(config.layers):
        assert isinstance(layer.attention, LatentAttentionConfig)
        ours, published = f"layers.{i}", f"model.layers.{i}"
        found |= _latent_sources(f"{ours}.attention", layer.attention, _published(f"{published}.self_attn"))
        if not isinstance(layer.feed_forward, ExpertsConfig):
            continue
        ours, mlp = f"{ours}.feed_forward", f"{published}.mlp"
        found[f"{ours}.router.weight"] = Source(f"{mlp}.gate.weight")
        found[f"{ours}.router.correction"] = Source(f"{mlp}.gate.e_score_correction_bias")
        found |= either_sources(ours, layer.feed_forward, names, mlp, LLAMA_NAMES)
        for name, part in LLAMA_NAMES.items():
            found[f"{ours}.shared.{name}.weight"] = Source(f"{mlp}.shared_experts.{part}.weight")
    return found


def _published(attention: str) -> dict[str, str]:
    names = {
        "query": "q_proj",
        "query_down": "q_a_proj",
        "query_norm": "q_a_layernorm",
        "query_up": "q_b_proj",
        "latent": "kv_a_proj_with_mqa",
        "latent_norm": "kv_a_layernorm",
        "heads": "kv_b_proj",
        "output": "o_proj",
    }
    return {ours: f"{attention}.{name}" for ours, name in names.items()}


def _latent_sources(ours: str, config: LatentAttentionConfig, named: Mapping[str, str]) -> dict[str, Source]:
    """Each head's part of `heads`, [N + Dv, Z], is what makes its key of a latent above what makes its value."""
    heads, plain, value = config.spec.num_heads, config.plain_width, config.head_value_width
    query, latent = (
        (RotatedInHalves(heads, plain), RotatedInHalves(1, config.spec.value_width))
        if config.interleaved
        else (None, None)
    )
    found = {
        f"{ours}.query.weight": Source(
            f"{named['query' if config.query_rank is None else 'query_up']}.weight", arrange=query
        )
    }
    for kind in ("weight", "bias"):
        found[f"{ours}.query_down.{kind}"] = Source(f"{named['query_down']}.{kind}")
        found[f"{ours}.query_norm.{kind}"] = Source(f"{named['query_norm']}.{kind}")
        found[f"{ours}.latent.{kind}"] = Source(f"{named['latent']}.{kind}", arrange=latent)
        found[f"{ours}.latent_norm.{kind}"] = Source(f"{named['latent_norm']}.{kind}")
        found[f"{ours}.output.{kind}"] = Source(f"{named['output']}.{kind}")
    for head in range(heads):
        own, begin = f"{ours}.heads.{head}", head * (plain + value)
        found[f"{own}.into_latent.weight"] = Source(
            f"{named['heads']}.weight", rows=(begin, begin + plain), arrange=Turned()
        )
        found[f"{own}.out_of_latent.weight"] = Source(
            f"{named['heads']}.weight", rows=(begin + plain, begin + plain + value)
        )
    return found


@dataclass(frozen=True, slots=True)
class RotatedInHalves:
    """Puts each head's rotated rows, which follow `plain` others, into our order: [0, 2, 4, 1, 3, 5] of 6.

    DeepSeek rotates row 2i against 2i + 1, as complex numbers, and we row i against i + half. Query and key reordered
    alike have the same product.
    """

    num_heads: int
    plain: int

    def __call__(self, rows: Tensor) -> Tensor:
        heads = rows.view(self.num_heads, -1, *rows.shape[1:])
        plain, rotated = heads[:, : self.plain], heads[:, self.plain :]
        return torch.cat([plain, rotated[:, 0::2], rotated[:, 1::2]], dim=1).view(rows.shape)


def gguf_document(model: gguf.GgufModel) -> Document:
    """Files from before llama.cpp knew compressed caches say key and value widths under other keys."""
    own, scaling = model.own, model.rope_scaling()
    if scaling is not None and scaling["rope_type"] == "yarn":
        # What llama.cpp makes of it: a larger scale of scores, and rotation that doesn't enlarge.
        scale = own.number("rope.scaling.yarn_log_multiplier", 0.0) / 0.1
        scaling |= {"mscale_all_dim": scale, "attention_factor": 1.0}
    rotated, rank = own.integer("rope.dimension_count"), own.integer("attention.kv_lora_rank")
    key = own.integer("attention.key_length_mla", own.integer("attention.key_length"))
    value = own.integer("attention.value_length_mla", own.integer("attention.value_length"))
    routing = own.integer("expert_gating_func", _SOFTMAX)
    if routing not in (_SOFTMAX, _SIGMOID):
        raise UserError(
            f"{model.where}: expert_gating_func {routing} is not supported, only softmax and sigmoid (1, 2)"
        )
    sigmoid = routing == _SIGMOID
    groups = own.integer("expert_group_count", 1)
    values: dict[str, Any] = {
        "num_hidden_layers": own.integer("block_count") - own.count("nextn_predict_layers", 0),
        "q_lora_rank": own.values.get("attention.q_lora_rank"),
        "kv_lora_rank": rank,
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": key - rotated,
        "v_head_dim": value,
        "first_k_dense_replace": own.count("leading_dense_block_count", 0),
        "moe_intermediate_size": own.integer("expert_feed_forward_length"),
        "n_routed_experts": own.integer("expert_count"),
        "n_shared_experts": own.values.get("expert_shared_count") or None,
        "num_experts_per_tok": own.integer("expert_used_count"),
        "norm_topk_prob": own.flag("expert_weights_norm", False),
        "routed_scaling_factor": own.number("expert_weights_scale", 1.0),
        "n_group": groups,
        "topk_group": own.integer("expert_group_used_count", 1),
        "rope_scaling": scaling,
        "partial_rotary_factor": 1.0,
    }
    if not sigmoid:
        values["topk_method"] = "group_limited_greedy" if groups > 1 else "greedy"
    return model.document("deepseek_v3" if sigmoid else "deepseek_v2", **values)


def gguf_sources(config: DecoderConfig, names: Collection[str]) -> dict[str, Source]:
    found = gguf.sources(config, names)
    for i, layer in enumerate(config.layers):
        assert isinstance(layer.attention, LatentAttentionConfig)
        ours, blk = f"layers.{i}.attention", f"blk.{i}"
        named = {
            "query": f"{blk}.attn_q",
            "query_down": f"{blk}.attn_q_a",
            "query_norm": f"{blk}.attn_q_a_norm",
            "query_up": f"{blk}.attn_q_b",
            "latent": f"{blk}.attn_kv_a_mqa",
            "latent_norm": f"{blk}.attn_kv_a_norm",
            "heads": f"{blk}.attn_kv_b",
            "output": f"{blk}.attn_output",
        }
        found |= _latent_sources(ours, layer.attention, named)
        if f"{blk}.attn_k_b.weight" in names:  # the halves of attn_kv_b, the first one transposed already
            for head in range(layer.attention.spec.num_heads):
                found[f"{ours}.heads.{head}.into_latent.weight"] = Source(f"{blk}.attn_k_b.weight", at=head)
                found[f"{ours}.heads.{head}.out_of_latent.weight"] = Source(f"{blk}.attn_v_b.weight", at=head)
    return found
