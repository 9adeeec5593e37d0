"""Qwen 3: as Qwen 2, with each head's query and key normed in place of the biases.

Yang et al. 2025, arXiv 2505.09388.
"""

from __future__ import annotations

from collections.abc import Collection

from workers.decoder.config import DecoderConfig
from workers.decoder.families import gguf, llama, qwen2
from workers.decoder.families.document import Document
from workers.decoder.storage import Source

MODEL_TYPES: tuple[str, ...] = ("qwen3",)
GGUF_ARCHITECTURES: tuple[str, ...] = ("qwen3",)

sources = llama.sources


def read_config(document: Document) -> DecoderConfig:
    document = document.over({"head_dim": 128})
    return llama.llama_like(
        document,
        llama.gated_feed_forward(document),
        windows=qwen2.upper_windows(document),
        attention_bias=document.flag("attention_bias", False),
        query_key_norm="head",
    )


def gguf_document(model: gguf.GgufModel) -> Document:
    return model.document("qwen3")


def gguf_sources(config: DecoderConfig, names: Collection[str]) -> dict[str, Source]:
    return gguf.sources(config, names)
