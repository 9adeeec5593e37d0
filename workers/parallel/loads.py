"""How often tokens chose each expert, and which experts together: what the planner goes by. Pure.

L MoE layers, E experts, T tokens, k experts a token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_CHUNK = 4096  # tokens that are counted at once: a matrix of so many by E


class ExpertLoads:
    """Adds up, over any number of steps and ranks.

    `counts` [L, E] int64: tokens that chose an expert. `coactivations` [L, E, E] int64, symmetric, zero on the
    diagonal: tokens that chose both.
    """

    def __init__(self, *, layers: Sequence[int], num_experts: int) -> None:
        self.layers = tuple(layers)
        self.num_experts = num_experts
        self.counts = np.zeros((len(self.layers), num_experts), dtype=np.int64)
        self.coactivations = np.zeros((len(self.layers), num_experts, num_experts), dtype=np.int64)
        self._index = {layer: i for i, layer in enumerate(self.layers)}

    def add(self, layer: int, expert_ids: NDArray[np.int64]) -> None:
        """expert_ids [T, k], distinct in each row: what a layer's router chose. ValueError for another layer."""
        if layer not in self._index:
            raise ValueError(f"layer {layer} has no experts here; layers {list(self.layers)} have")
        i = self._index[layer]
        for start in range(0, len(expert_ids), _CHUNK):
            some = expert_ids[start : start + _CHUNK]
            chosen = np.zeros((len(some), self.num_experts), dtype=np.float32)
            np.put_along_axis(chosen, some, 1.0, axis=1)
            both = (chosen.T @ chosen).astype(np.int64)  # [E, E]; a chunk's counts are exact in float32
            self.counts[i] += both.diagonal()
            np.fill_diagonal(both, 0)
            self.coactivations[i] += both

    def merge(self, other: ExpertLoads) -> None:
        """Take over another rank's counts. ValueError when they are of another model."""
        if (self.layers, self.num_experts) != (other.layers, other.num_experts):
            raise ValueError("loads of different layers or numbers of experts don't add up")
        self.counts += other.counts
        self.coactivations += other.coactivations

    def to_json(self) -> dict[str, Any]:
        """Co-activations as their upper triangles, row by row."""
        above = np.triu_indices(self.num_experts, 1)
        return {
            "num_experts": self.num_experts,
            "layers": {
                str(layer): {"counts": counts.tolist(), "coactivations": both[above].tolist()}
                for layer, counts, both in zip(self.layers, self.counts, self.coactivations, strict=True)
            },
        }

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> ExpertLoads:
        """ValueError when the document is not one that `to_json` made."""
        try:
            layers = document["layers"]
            loads = cls(layers=[int(layer) for layer in layers], num_experts=int(document["num_experts"]))
            above = np.triu_indices(loads.num_experts, 1)
            for i, layer in enumerate(layers.values()):
                loads.counts[i] = layer["counts"]
                loads.coactivations[i][above] = layer["coactivations"]
                loads.coactivations[i] += loads.coactivations[i].T
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"not expert loads: {json.dumps(document)[:80]} ({error})") from None
        return loads
