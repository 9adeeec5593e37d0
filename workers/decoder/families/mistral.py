"""Mistral: Llama with a sliding window (Jiang et al. 2023)."""

from __future__ import annotations

from workers.decoder.config import DecoderConfig, FeedForwardConfig
from workers.decoder.families import llama
from workers.decoder.families.document import Document

MODEL_TYPES: tuple[str, ...] = ("mistral",)

sources = llama.sources


def read_config(document: Document) -> DecoderConfig:
    feed_forward = FeedForwardConfig(
        width=document.integer("intermediate_size"),
        activation=document.choice("hidden_act", llama.ACTIVATIONS, "silu"),
    )
    return llama.llama_like(document, feed_forward, window=document.optional_integer("sliding_window", 4096))
