"""Granite 3: Llama with multipliers of embeddings, attention, residuals and logits (IBM Granite Team 2024)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from workers.decoder.config import DecoderConfig, LayerConfig
from workers.decoder.families import gguf, llama
from workers.decoder.families.document import Document
from workers.decoder.families.layers import each_layer, with_attention
from workers.decoder.storage import Source

MODEL_TYPES: tuple[str, ...] = ("granite",)
GGUF_ARCHITECTURES: tuple[str, ...] = ("granite",)

sources = llama.sources


def read_config(document: Document) -> DecoderConfig:
    config = llama.llama_like(
        document,
        llama.gated_feed_forward(document, bias=document.flag("mlp_bias", False)),
        attention_bias=document.flag("attention_bias", False),
    )
    return with_multipliers(document, config)


def with_multipliers(document: Document, config: DecoderConfig) -> DecoderConfig:
    """`config` of a Llama with Granite's four multipliers; scores are multiplied by attention_multiplier alone."""
    residual_scale = document.number("residual_multiplier", 1.0)
    scale = document.number("attention_multiplier", 1.0)

    def layer(_: int, equal: LayerConfig) -> LayerConfig:
        return replace(with_attention(equal, spec={"scale": scale}), residual_scale=residual_scale)

    logits_scaling = document.number("logits_scaling", 1.0)
    if logits_scaling == 0:
        raise document.wrong("logits_scaling", "a number other than 0")
    return replace(
        each_layer(config, layer),
        embedding_scale=document.number("embedding_multiplier", 1.0),
        logit_scale=1.0 / logits_scaling,
    )


def gguf_document(model: gguf.GgufModel) -> Document:
    bias = "blk.0.attn_q.bias" in model
    return model.document("granite", **gguf_multipliers(model), attention_bias=bias)


def gguf_multipliers(model: gguf.GgufModel) -> dict[str, Any]:
    own = model.own
    return {
        "embedding_multiplier": own.number("embedding_scale", 1.0),
        "residual_multiplier": own.number("residual_scale", 1.0),
        "attention_multiplier": own.number("attention.scale", model.head_width**-0.5),
        "logits_scaling": own.number("logit_scale", 1.0),
    }


def gguf_sources(config: DecoderConfig, names: Collection[str]) -> dict[str, Source]:
    return gguf.sources(config, names, pairs_apart=False)
