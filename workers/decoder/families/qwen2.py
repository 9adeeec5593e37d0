"""Qwen 2 and 2.5: Llama with biases on query, key and value; a window in the upper layers, if any.

Yang et al. 2024, arXiv 2407.10671.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from workers.decoder.config import DecoderConfig
from workers.decoder.families import gguf, llama
from workers.decoder.families.document import Document
from workers.decoder.families.layers import layer_windows
from workers.decoder.storage import Source

MODEL_TYPES: tuple[str, ...] = ("qwen2",)
GGUF_ARCHITECTURES: tuple[str, ...] = ("qwen2",)

sources = llama.sources


def read_config(document: Document) -> DecoderConfig:
    return llama.llama_like(
        document, llama.gated_feed_forward(document), windows=upper_windows(document), qkv_bias=True
    )


def upper_windows(document: Document) -> Sequence[int | None]:
    """Each layer's window: of the layers from max_window_layers on, where use_sliding_window is set."""
    num_layers = document.integer("num_hidden_layers")
    if not document.flag("use_sliding_window", False):
        return [None] * num_layers
    below = document.values.get("max_window_layers", 28)
    if not isinstance(below, int):
        raise document.wrong("max_window_layers", "a number of layers")
    return layer_windows(document, num_layers, lambda i: i >= below, document.integer("sliding_window", 4096))


def gguf_document(model: gguf.GgufModel) -> Document:
    return model.document("qwen2")


def gguf_sources(config: DecoderConfig, names: Collection[str]) -> dict[str, Source]:
    return gguf.sources(config, names)
