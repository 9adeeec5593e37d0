"""Phi-3 and Phi-4: Llama with query, key and value in one tensor, gate and up in another, and LongRoPE.

Abdin et al. 2024, arXiv 2404.14219.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from workers.decoder.config import DecoderConfig, FeedForwardConfig
from workers.decoder.families import gguf, llama
from workers.decoder.families.document import Document
from workers.decoder.families.names import named
from workers.decoder.storage import Source

MODEL_TYPES: tuple[str, ...] = ("phi3",)
GGUF_ARCHITECTURES: tuple[str, ...] = ("phi3",)


def read_config(document: Document) -> DecoderConfig:
    window = document.optional_integer("sliding_window")
    return llama.llama_like(document, llama.gated_feed_forward(document), window=window, eps=1e-5)


def sources(config: DecoderConfig, names: Collection[str]) -> dict[str, Source]:
    found = llama.shared_sources(config)
    found |= named(config, {}, "model.layers.{}", {"feed_forward.down": "mlp.down_proj"})
    for i, layer in enumerate(config.layers):
        spec, forward = layer.attention.spec, layer.feed_forward
        assert isinstance(forward, FeedForwardConfig)
        published = f"model.layers.{i}.self_attn.qkv_proj.weight"
        begin = 0
        for ours, rows in (
            ("query", spec.num_heads * spec.head_width),
            ("key", spec.num_kv_heads * spec.head_width),
            ("value", spec.num_kv_heads * spec.value_width),
        ):
            found[f"layers.{i}.attention.{ours}.weight"] = Source(published, rows=(begin, begin + rows))
            begin += rows
        published, width = f"model.layers.{i}.mlp.gate_up_proj.weight", forward.width
        found[f"layers.{i}.feed_forward.gate.weight"] = Source(published, rows=(0, width))
        found[f"layers.{i}.feed_forward.up.weight"] = Source(published, rows=(width, 2 * width))
    return found


def gguf_document(model: gguf.GgufModel) -> Document:
    own = model.own
    values: dict[str, Any] = {"sliding_window": own.values.get("attention.sliding_window") or None}
    if "rope_factors_long.weight" in model:
        values["rope_scaling"] = gguf_longrope(model)
    return model.document("phi3", **values)


def gguf_longrope(model: gguf.GgufModel) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "long_factor": model.numbers("rope_factors_long.weight"),
        "short_factor": model.numbers("rope_factors_short.weight"),
        "original_max_position_embeddings": model.own.integer("rope.scaling.original_context_length"),
        "attention_factor": model.own.number("rope.scaling.attn_factor", 1.0),
    }


def gguf_sources(config: DecoderConfig, names: Collection[str]) -> dict[str, Source]:
    return gguf.sources(config, names)
