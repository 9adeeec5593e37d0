"""Granite-MoE: Mixtral with multipliers of embeddings, attention, residuals and logits (IBM Granite 3, 2024)."""

from __future__ import annotations

from collections.abc import Collection

from workers.decoder.config import DecoderConfig, ExpertsConfig, RouterConfig
from workers.decoder.families import gguf, granite, llama
from workers.decoder.families.document import Document
from workers.decoder.families.expert_names import stacked_sources
from workers.decoder.storage import Source

MODEL_TYPES: tuple[str, ...] = ("granitemoe",)
GGUF_ARCHITECTURES: tuple[str, ...] = ("granitemoe",)


def read_config(document: Document) -> DecoderConfig:
    experts = ExpertsConfig(
        router=RouterConfig(
            num_experts=document.integer("num_local_experts", 8),
            top_k=document.integer("num_experts_per_tok", 2),
            scores="softmax_chosen",
        ),
        expert=llama.gated_feed_forward(document),
    )
    config = llama.llama_like(document, experts, attention_bias=document.flag("attention_bias", False))
    return granite.with_multipliers(document, config)


def sources(config: DecoderConfig, names: Collection[str]) -> dict[str, Source]:
    found = llama.shared_sources(config)
    for i, layer in enumerate(config.layers):
        assert isinstance(layer.feed_forward, ExpertsConfig)
        ours, moe = f"layers.{i}.feed_forward", f"model.layers.{i}.block_sparse_moe"
        if f"{moe}.experts.gate_up_proj" in names:
            found[f"{ours}.router.weight"] = Source(f"{moe}.router.weight")
            gate_up, down = f"{moe}.experts.gate_up_proj", f"{moe}.experts.down_proj"
        else:
            found[f"{ours}.router.weight"] = Source(f"{moe}.router.layer.weight")
            gate_up, down = f"{moe}.input_linear.weight", f"{moe}.output_linear.weight"
        found |= stacked_sources(ours, layer.feed_forward, gate_up, down)
    return found


def gguf_document(model: gguf.GgufModel) -> Document:
    own = model.own
    return model.document(
        "granitemoe",
        num_local_experts=own.integer("expert_count"),
        num_experts_per_tok=own.integer("expert_used_count"),
        **granite.gguf_multipliers(model),
        attention_bias="blk.0.attn_q.bias" in model,
    )


def gguf_sources(config: DecoderConfig, names: Collection[str]) -> dict[str, Source]:
    return gguf.sources(config, names, pairs_apart=False)
