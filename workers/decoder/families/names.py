"""Tables of names: ours -> published, each standing for a weight and a bias."""

from __future__ import annotations

from collections.abc import Mapping

from workers.decoder.config import DecoderConfig
from workers.decoder.storage import Source

KINDS = ("weight", "bias")


def named(config: DecoderConfig, model: Mapping[str, str], layers: str, layer: Mapping[str, str]) -> dict[str, Source]:
    """`model` has names as they are; `layer` those below `layers`, in which {} stands for a layer's number."""
    found = {f"{ours}.{kind}": Source(f"{published}.{kind}") for ours, published in model.items() for kind in KINDS}
    for i in range(len(config.layers)):
        for ours, published in layer.items():
            for kind in KINDS:
                found[f"layers.{i}.{ours}.{kind}"] = Source(f"{layers.format(i)}.{published}.{kind}")
    return found
