"""Gemma: Llama with scaled embeddings and norms stored less 1 (Gemma Team 2024)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from workers.decoder.config import DecoderConfig
from workers.decoder.families import gguf, llama
from workers.decoder.families.arrange import one_more
from workers.decoder.families.document import Document
from workers.decoder.storage import Source

MODEL_TYPES: tuple[str, ...] = ("gemma",)
GGUF_ARCHITECTURES: tuple[str, ...] = ("gemma",)

# "gelu" in the first files meant the approximation that the model was trained with.
ACTIVATIONS = llama.ACTIVATIONS | {"gelu": "gelu_tanh"}
DEFAULTS = {"head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True}


def read_config(document: Document) -> DecoderConfig:
    document = document.over(DEFAULTS)
    document.refuse({"use_bidirectional_attention": False})
    feed_forward = replace(
        llama.gated_feed_forward(document), activation=document.choice("hidden_act", ACTIVATIONS, "gelu_pytorch_tanh")
    )
    config = llama.llama_like(document, feed_forward, attention_bias=document.flag("attention_bias", False))
    return replace(config, embedding_scale=config.hidden_width**0.5)


def sources(config: DecoderConfig, names: Collection[str]) -> dict[str, Source]:
    return with_full_norms(llama.sources(config, names))


def with_full_norms(found: dict[str, Source]) -> dict[str, Source]:
    """Every norm's weight with the 1 that the files leave out. GGUF files have it already."""
    return {
        ours: replace(source, arrange=one_more) if ours.endswith("norm.weight") else source
        for ours, source in found.items()
    }


def gguf_document(model: gguf.GgufModel) -> Document:
    return model.document("gemma")


def gguf_sources(config: DecoderConfig, names: Collection[str]) -> dict[str, Source]:
    return gguf.sources(config, names)
