"""Decoders whose layers differ, made from one whose layers are equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from workers.decoder.config import AttentionConfig, DecoderConfig, LayerConfig
from workers.decoder.families.document import Document

_WINDOWED = {"sliding_attention": True, "full_attention": False}


def each_layer(config: DecoderConfig, change: Callable[[int, LayerConfig], LayerConfig]) -> DecoderConfig:
    """`config` with each layer as `change` makes it, given its number."""
    return replace(config, layers=tuple(change(i, layer) for i, layer in enumerate(config.layers)))


def with_attention(layer: LayerConfig, *, spec: dict[str, Any] | None = None, **changes: Any) -> LayerConfig:
    """`layer` with fields of its attention changed, and with those of the attention's `spec`."""
    assert isinstance(layer.attention, AttentionConfig)
    attention = replace(layer.attention, spec=replace(layer.attention.spec, **(spec or {})), **changes)
    return replace(layer, attention=attention)


def layer_windows(
    document: Document, num_layers: int, default: Callable[[int], bool], window: int | None
) -> Sequence[int | None]:
    """Each layer's window: by layer_types where the configuration has it, else where `default` says so of layer i."""
    if "layer_types" not in document:
        return [window if default(i) else None for i in range(num_layers)]
    types = document.values["layer_types"]
    if not isinstance(types, list) or len(types) != num_layers or any(kind not in _WINDOWED for kind in types):
        raise document.wrong("layer_types", f"{num_layers} times {' or '.join(_WINDOWED)}")
    return [window if _WINDOWED[kind] else None for kind in types]
