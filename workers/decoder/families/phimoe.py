"""Phi-3.5-MoE: Mixtral with LayerNorm, biases and SparseMixer routing (Abdin et al. 2024, Liu et al. 2024)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from pipeline.errors import UserError
from workers.decoder.config import (
    DecoderConfig,
    ExpertsConfig,
    LayerConfig,
    NormConfig,
    RouterConfig,
)
from workers.decoder.families import gguf, llama, phi3
from workers.decoder.families.document import Document
from workers.decoder.families.expert_names import MIXTRAL_NAMES, expert_sources, stacked_sources
from workers.decoder.families.layers import each_layer
from workers.decoder.storage import Source

MODEL_TYPES: tuple[str, ...] = ("phimoe",)
GGUF_ARCHITECTURES: tuple[str, ...] = ("phimoe",)


def read_config(document: Document) -> DecoderConfig:
    document = _with_attention_factor(document)
    experts = ExpertsConfig(
        router=RouterConfig(
            num_experts=document.integer("num_local_experts", 16),
            top_k=document.integer("num_experts_per_tok", 2),
            scores="sparsemixer",
            tolerance=document.number("router_jitter_noise", 0.01),
        ),
        expert=llama.gated_feed_forward(document),
    )
    if experts.router.top_k != 2:
        raise UserError(f"{document.where}: num_experts_per_tok must be 2, the number that SparseMixer chooses")
    config = llama.llama_like(
        document,
        experts,
        window=document.optional_integer("sliding_window"),
        attention_bias=document.flag("attention_bias", False),
        theta=1e6,
        eps=1e-5,
    )
    norm = NormConfig(kind="layer", eps=config.norm.eps, bias=True)

    def layer(_: int, equal: LayerConfig) -> LayerConfig:
        return replace(equal, norm=norm)

    return replace(each_layer(config, layer), norm=norm, output_bias=document.flag("lm_head_bias", False))


def _with_attention_factor(document: Document) -> Document:
    """LongRoPE's attention_factor goes by other names here, one for short texts and one for long ones."""
    key = "rope_parameters" if "rope_parameters" in document else "rope_scaling"
    rope = document.inner(key)
    if "long_mscale" not in rope:
        return document
    if rope.number("short_mscale", rope.number("long_mscale")) != rope.number("long_mscale"):
        raise UserError(f"{rope.where}: short_mscale and long_mscale that differ are not supported")
    values = {**rope.values, "attention_factor": rope.number("long_mscale")}
    return Document(document.where, {**document.values, key: values})


def sources(config: DecoderConfig, names: Collection[str]) -> dict[str, Source]:
    """Experts one by one under Mixtral's names, as published, or stacked, as in transformers 5's memory."""
    found = llama.shared_sources(config)
    found["norm.bias"], found["output.bias"] = Source("model.norm.bias"), Source("lm_head.bias")
    for i, layer in enumerate(config.layers):
        assert isinstance(layer.feed_forward, ExpertsConfig)
        ours, published = f"layers.{i}", f"model.layers.{i}"
        found[f"{ours}.attention_norm.bias"] = Source(f"{published}.input_layernorm.bias")
        found[f"{ours}.feed_forward_norm.bias"] = Source(f"{published}.post_attention_layernorm.bias")
        ours = f"{ours}.feed_forward"
        gate_up, single = f"{published}.mlp.experts.gate_up_proj", f"{published}.block_sparse_moe"
        if gate_up in names:
            found[f"{ours}.router.weight"] = Source(f"{published}.mlp.router.weight")
            found |= stacked_sources(ours, layer.feed_forward, gate_up, f"{published}.mlp.experts.down_proj")
        else:
            found[f"{ours}.router.weight"] = Source(f"{single}.gate.weight")
            found |= expert_sources(ours, layer.feed_forward, f"{single}.experts", MIXTRAL_NAMES)
    return found


def gguf_document(model: gguf.GgufModel) -> Document:
    own = model.own
    values: dict[str, Any] = {"sliding_window": own.values.get("attention.sliding_window") or None}
    if "rope_factors_long.weight" in model:
        values["rope_scaling"] = phi3.gguf_longrope(model)
    return model.document(
        "phimoe",
        num_local_experts=own.integer("expert_count"),
        num_experts_per_tok=own.integer("expert_used_count"),
        attention_bias="blk.0.attn_output.bias" in model,
        lm_head_bias="output.bias" in model,
        **values,
    )


def gguf_sources(config: DecoderConfig, names: Collection[str]) -> dict[str, Source]:
    return gguf.sources(config, names)
