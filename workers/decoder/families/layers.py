"""Decoders whose layers differ, made from one whose layers are equal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from workers.decoder.config import AttentionConfig, DecoderConfig, LayerConfig


def each_layer(config: DecoderConfig, change: Callable[[int, LayerConfig], LayerConfig]) -> DecoderConfig:
    """`config` with each layer as `change` makes it, given its number."""
    return replace(config, layers=tuple(change(i, layer) for i, layer in enumerate(config.layers)))


def with_attention(layer: LayerConfig, *, spec: dict[str, Any] | None = None, **changes: Any) -> LayerConfig:
    """`layer` with fields of its attention changed, and with those of the attention's `spec`."""
    assert isinstance(layer.attention, AttentionConfig)
    attention = replace(layer.attention, spec=replace(layer.attention.spec, **(spec or {})), **changes)
    return replace(layer, attention=attention)
