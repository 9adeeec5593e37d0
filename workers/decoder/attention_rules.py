"""Which layers of a model take which attention pattern, as a person says it. Pure: no torch.

Rules come in order, and the last that names a layer decides on it; a layer that none names keeps the model's own
pattern. With the form `alternating` the layers that a rule decides on take the pattern's first part and its second in
turn, the lowest layer the first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from workers.decoder.patterns import Fixed, Form, Strided

# What each pattern takes, besides `layers`: needed, and may be given.
_TAKES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "full": ((), ()),
    "sliding": (("window",), ()),
    "strided": (("stride",), ("form",)),
    "fixed": (("block", "summary"), ("form", "distinct")),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPattern:
    """A layer's pattern, in the terms of AttentionSpec; neither: full."""

    window: int | None = None
    sparse: Strided | Fixed | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionRule:
    """A pattern for some layers. ValueError for what does not go together.

    `layers`: "all", "even", "odd", or numbers and ranges from 0, such as "0-3,10".
    """

    pattern: Literal["full", "sliding", "strided", "fixed"]
    layers: str = "all"
    window: int | None = None
    stride: int | None = None
    block: int | None = None
    summary: int | None = None
    form: Literal["merged", "alternating", "divided"] | None = None  # None: merged
    distinct: bool | None = None  # heads that attend to summaries take different ones; None: no

    def __post_init__(self) -> None:
        if self.pattern not in _TAKES:
            raise ValueError(f"pattern {self.pattern!r} is not known ({', '.join(_TAKES)} are)")
        needed, allowed = _TAKES[self.pattern]
        for key in ("window", "stride", "block", "summary", "form", "distinct"):
            value = getattr(self, key)
            if value is None and key in needed:
                raise ValueError(f"pattern {self.pattern} needs {key}")
            if value is not None and key not in needed + allowed:
                raise ValueError(f"{key} is not for pattern {self.pattern}; leave it out")
            if key in needed and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{key} must be a whole number of at least 1, not {value!r}")
        if self.form not in (None, "merged", "alternating", "divided"):
            raise ValueError(f"form must be merged, alternating or divided, not {self.form!r}")
        self.layer_pattern(0)
        _ranges(self.layers)

    def names(self, num_layers: int) -> list[int]:
        """The layers that it names. ValueError where it names one that a model of `num_layers` does not have."""
        if self.layers in ("all", "even", "odd"):
            return list(range(self.layers == "odd", num_layers, 1 if self.layers == "all" else 2))
        named = {layer for first, last in _ranges(self.layers) for layer in (first, last)}
        if max(named) >= num_layers:
            raise ValueError(
                f"layers {self.layers!r}: no layer {max(named)} in the model, its last is {num_layers - 1}"
            )
        return sorted({layer for first, last in _ranges(self.layers) for layer in range(first, last + 1)})

    def layer_pattern(self, turn: int) -> LayerPattern:
        """The pattern of the `turn`-th layer that it decides on."""
        form: Form = "merged"
        if self.form == "divided":
            form = "divided"
        elif self.form == "alternating":
            form = "second" if turn % 2 else "first"
        if self.stride is not None:
            if form == "first":  # a sliding window, and nothing else
                return LayerPattern(window=self.stride + 1)
            return LayerPattern(sparse=Strided(stride=self.stride, form=form))
        if self.block is not None and self.summary is not None:
            fixed = Fixed(block=self.block, summary=self.summary, form=form, distinct=bool(self.distinct))
            return LayerPattern(sparse=fixed)
        return LayerPattern(window=self.window)


def parse_rules(given: Sequence[AttentionRule | Mapping[str, Any]]) -> tuple[AttentionRule, ...]:
    """Rules, or mappings of their fields. ValueError naming the rule, by its number from 0, and what is wrong in it."""
    known = {field.name for field in fields(AttentionRule)}
    rules = []
    for number, one in enumerate(given):
        if isinstance(one, AttentionRule):
            rules.append(one)
            continue
        unknown = sorted(set(one) - known)
        if unknown:
            raise ValueError(f"attention[{number}]: unknown key {unknown[0]!r} (known: {', '.join(sorted(known))})")
        if "pattern" not in one:
            raise ValueError(f"attention[{number}]: pattern is missing")
        try:
            rules.append(AttentionRule(**one))
        except ValueError as error:
            raise ValueError(f"attention[{number}]: {error}") from None
    return tuple(rules)


def assign(rules: Sequence[AttentionRule], num_layers: int) -> list[LayerPattern | None]:
    """Each layer's pattern; None where the model's own stays. ValueError for a layer that is not there."""
    decided: list[int | None] = [None] * num_layers
    for number, rule in enumerate(rules):
        try:
            for layer in rule.names(num_layers):
                decided[layer] = number
        except ValueError as error:
            raise ValueError(f"attention[{number}]: {error}") from None
    turns = [0] * len(rules)
    patterns: list[LayerPattern | None] = []
    for winner in decided:
        if winner is None:
            patterns.append(None)
            continue
        patterns.append(rules[winner].layer_pattern(turns[winner]))
        turns[winner] += 1
    return patterns


def _ranges(layers: str) -> list[tuple[int, int]]:
    """ "0-3,10" -> [(0, 3), (10, 10)]; nothing for all, even and odd. ValueError for what is no such text."""
    if layers in ("all", "even", "odd"):
        return []
    ranges = []
    for piece in layers.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", piece)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ValueError(f"layers must be all, even, odd, or numbers and ranges such as 0-3,10, not {layers!r}")
        ranges.append((first, last))
    return ranges
