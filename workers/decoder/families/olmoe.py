"""OLMoE: many small experts, norms over the whole query and key (Muennighoff et al. 2024)."""

from __future__ import annotations

from collections.abc import Collection

from workers.decoder.config import DecoderConfig, ExpertsConfig
from workers.decoder.families import gguf, llama, qwen2_moe
from workers.decoder.families.document import Document
from workers.decoder.families.layers import each_layer, with_attention
from workers.decoder.storage import Source

MODEL_TYPES: tuple[str, ...] = ("olmoe",)
GGUF_ARCHITECTURES: tuple[str, ...] = ("olmoe",)

sources = qwen2_moe.sources


def read_config(document: Document) -> DecoderConfig:
    experts = ExpertsConfig(
        router=qwen2_moe.read_router(document, num_experts=64, top_k=8),
        expert=llama.gated_feed_forward(document),
    )
    bias = document.flag("attention_bias", False)
    config = llama.llama_like(document, experts, attention_bias=bias, query_key_norm="projection", eps=1e-5)
    clip = document.number("clip_qkv") if "clip_qkv" in document else None
    return each_layer(config, lambda _, layer: with_attention(layer, clip_qkv=clip))


def gguf_document(model: gguf.GgufModel) -> Document:
    own = model.own
    return model.document(
        "olmoe",
        num_experts=own.integer("expert_count"),
        num_experts_per_tok=own.integer("expert_used_count"),
        norm_topk_prob=own.flag("expert_weights_norm", False),
        clip_qkv=own.values.get("attention.clamp_kqv"),
    )


def gguf_sources(config: DecoderConfig, names: Collection[str]) -> dict[str, Source]:
    return gguf.sources(config, names)
