"""Qwen3-MoE: Qwen2-MoE without the shared expert, with a norm over each query and key head (Yang et al. 2025)."""

from __future__ import annotations

from collections.abc import Collection

from workers.decoder.config import DecoderConfig, ExpertsConfig, FeedForwardConfig
from workers.decoder.families import gguf, llama, qwen2_moe
from workers.decoder.families.document import Document
from workers.decoder.storage import Source

MODEL_TYPES: tuple[str, ...] = ("qwen3_moe",)
GGUF_ARCHITECTURES: tuple[str, ...] = ("qwen3moe",)

sources = qwen2_moe.sources


def read_config(document: Document) -> DecoderConfig:
    experts = ExpertsConfig(
        router=qwen2_moe.read_router(document, num_experts=128, top_k=8),
        expert=FeedForwardConfig(
            width=document.integer("moe_intermediate_size", 768),
            activation=document.choice("hidden_act", llama.ACTIVATIONS, "silu"),
        ),
    )
    window = None
    if document.flag("use_sliding_window", False):
        window = document.optional_integer("sliding_window", 4096)
    bias = document.flag("attention_bias", False)
    config = llama.llama_like(document, experts, window=window, attention_bias=bias, query_key_norm="head")
    return qwen2_moe.with_dense_layers(document, config)


def gguf_document(model: gguf.GgufModel) -> Document:
    own = model.own
    return model.document(
        "qwen3_moe",
        num_experts=own.integer("expert_count"),
        num_experts_per_tok=own.integer("expert_used_count"),
        moe_intermediate_size=own.integer("expert_feed_forward_length"),
        norm_topk_prob=own.flag("expert_weights_norm", True),
    )


def gguf_sources(config: DecoderConfig, names: Collection[str]) -> dict[str, Source]:
    return gguf.sources(config, names)
