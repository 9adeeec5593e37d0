"""A model's description with other attention patterns than its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipeline.errors import UserError
from workers.decoder.attention_rules import AttentionRule, assign, parse_rules
from workers.decoder.checkpoint import Checkpoint
from workers.decoder.config import AttentionConfig, DecoderConfig


def with_attention(checkpoint: Checkpoint, rules: Sequence[AttentionRule | Mapping[str, Any]]) -> Checkpoint:
    """The checkpoint with its layers' patterns as `rules` say. UserError where they don't fit it."""
    try:
        config = choose_attention(checkpoint.config, rules)
    except ValueError as error:
        raise UserError(f"{checkpoint.path}: {error}") from None
    return Checkpoint(checkpoint.path, config, checkpoint.storage, checkpoint.sources)


def choose_attention(config: DecoderConfig, rules: Sequence[AttentionRule | Mapping[str, Any]]) -> DecoderConfig:
    """ValueError for rules that make no sense or don't fit the model."""
    layers = list(config.layers)
    for index, pattern in enumerate(assign(parse_rules(rules), len(layers))):
        if pattern is None:
            continue
        attention = layers[index].attention
        if not isinstance(attention, AttentionConfig):
            raise ValueError(
                f"attention: layer {index} has latent attention, which takes no other pattern; leave the layer out"
            )
        try:
            spec = replace(attention.spec, window=pattern.window, sparse=pattern.sparse)
        except ValueError as error:
            raise ValueError(f"attention: layer {index}: {error}") from None
        layers[index] = replace(layers[index], attention=replace(attention, spec=spec))
    return replace(config, layers=tuple(layers))


def describe_attention(config: DecoderConfig) -> str:
    """Which layers have which pattern, for people: "layers 0, 2: sliding 129; layer 1: strided 128, second part"."""
    named: dict[str, list[str]] = {}
    for index, layer in enumerate(config.layers):
        spec = layer.attention.spec
        size = "" if spec.window is None else f" {spec.window}"
        if spec.sparse is not None:
            numbers = [spec.sparse.stride] if spec.pattern == "strided" else [spec.sparse.block, spec.sparse.summary]  # type: ignore[union-attr]
            form = spec.sparse.form
            size = f" {'/'.join(map(str, numbers))}, {form}{' part' if form in ('first', 'second') else ''}"
        named.setdefault(spec.pattern + size, []).append(str(index))
    return "; ".join(f"layer{'s' if len(at) > 1 else ''} {', '.join(at)}: {name}" for name, at in named.items())
