"""Gemma 3: as Gemma 2 without soft-caps, with queries and keys normed and other rotary positions in sliding layers.

Gemma Team 2025, arXiv 2503.19786. Of a checkpoint that sees images as well (model_type gemma3) the text part is read.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from workers.decoder.config import DecoderConfig, LayerConfig
from workers.decoder.families import gemma2, gguf
from workers.decoder.families.document import Document
from workers.decoder.families.layers import each_layer, with_attention
from workers.decoder.families.rotary import read_rotary
from workers.decoder.storage import Source

MODEL_TYPES: tuple[str, ...] = ("gemma3_text", "gemma3")
GGUF_ARCHITECTURES: tuple[str, ...] = ("gemma3",)

DEFAULTS = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
FULL, SLIDING = "full_attention", "sliding_attention"
_LAYERS_OF_27B = 62


def read_config(document: Document) -> DecoderConfig:
    if document.text("model_type") == "gemma3":
        text = document.inner("text_config")
        document = Document(text.where, {**text.values, "model_type": "gemma3"})
    document = document.over(DEFAULTS)
    document.refuse({"attn_logit_softcapping": None})
    pattern, head_width = document.integer("sliding_window_pattern", 6), document.integer("head_dim")
    full = read_rotary(_rope_of(document, FULL, "rope_theta"), head_width, theta=1e6)
    sliding = read_rotary(_rope_of(document, SLIDING, "rope_local_base_freq"), head_width, theta=1e4)

    def own_rotary(_: int, layer: LayerConfig) -> LayerConfig:
        slides = layer.attention.spec.window is not None
        return with_attention(layer, rotary=sliding if slides else full, query_key_norm=layer.norm)

    return each_layer(gemma2.sandwiched(document, lambda i: (i + 1) % pattern != 0), own_rotary)


def _rope_of(document: Document, kind: str, theta: str) -> Document:
    """`document` with one kind of layer's rotary positions: a part of rope_parameters, before transformers 5 keys."""
    values: dict[str, Any] = dict(document.values)
    if "rope_parameters" in document:
        values["rope_parameters"] = dict(document.inner("rope_parameters").inner(kind).values)
    else:
        scaling = document.inner("rope_scaling").values if kind == FULL else {}
        base = {"rope_theta": document.number(theta)} if theta in document else {}
        values["rope_parameters"] = {**scaling, **base}
    values.pop("rope_theta", None)
    return Document(document.where, values)


def sources(config: DecoderConfig, names: Collection[str]) -> dict[str, Source]:
    found = gemma2.sources(config, names)
    for prefix in ("language_model.model.", "model.language_model."):  # before transformers 5, and since
        if f"{prefix}norm.weight" in names:
            return {
                ours: replace(source, name=prefix + source.name.removeprefix("model."))
                for ours, source in found.items()
            }
    return found


def gguf_document(model: gguf.GgufModel) -> Document:
    own = model.own
    full = {"rope_theta": own.number("rope.freq_base", 1e6), **(model.rope_scaling() or {})}
    return model.document(
        "gemma3_text",
        query_pre_attn_scalar=gemma2.score_width(model, _LAYERS_OF_27B),
        final_logit_softcapping=own.values.get("final_logit_softcapping"),
        sliding_window_pattern=own.integer("attention.sliding_window_pattern", 6),
        rope_parameters={FULL: full, SLIDING: {"rope_theta": own.number("rope.freq_base_swa", 1e4)}},
    )


def gguf_sources(config: DecoderConfig, names: Collection[str]) -> dict[str, Source]:
    return gguf.sources(config, names)
