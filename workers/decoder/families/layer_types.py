"""Which layers see everything and which a sliding window, as configurations list it."""

from __future__ import annotations

from collections.abc import Sequence

from workers.decoder.families.document import Document

SLIDING, FULL = "sliding_attention", "full_attention"


def read_layer_types(document: Document, otherwise: Sequence[str]) -> tuple[str, ...]:
    """SLIDING or FULL for each layer; `otherwise` where the configuration lists none."""
    num_layers = document.integer("num_hidden_layers")
    found = document.values.get("layer_types")
    if found is None:
        found = otherwise
    if (
        not isinstance(found, Sequence)
        or len(found) != num_layers
        or not all(kind in (SLIDING, FULL) for kind in found)
    ):
        raise document.wrong("layer_types", f"a list of {num_layers} times {SLIDING} or {FULL}")
    return tuple(found)


def read_windows(document: Document, layer_types: Sequence[str]) -> tuple[int | None, ...]:
    """The window of each layer: sliding_window where it slides, which must be there then."""
    return tuple(document.integer("sliding_window") if kind == SLIDING else None for kind in layer_types)
