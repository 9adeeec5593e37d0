"""Mistral: Llama with a sliding window (Jiang et al. 2023)."""

from __future__ import annotations

from workers.decoder.config import DecoderConfig
from workers.decoder.families import llama
from workers.decoder.families.document import Document

MODEL_TYPES: tuple[str, ...] = ("mistral",)

sources = llama.sources


def read_config(document: Document) -> DecoderConfig:
    window = document.optional_integer("sliding_window", 4096)
    return llama.llama_like(document, llama.gated_feed_forward(document), window=window)
