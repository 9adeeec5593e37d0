"""Where checkpoints keep a layer's experts: one by one as published, or stacked as transformers 5 holds them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from workers.decoder.config import ExpertsConfig
from workers.decoder.storage import Source

LLAMA_NAMES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
MIXTRAL_NAMES = {"gate": "w1", "up": "w3", "down": "w2"}


def expert_sources(ours: str, config: ExpertsConfig, published: str, parts: Mapping[str, str]) -> dict[str, Source]:
    """`ours.experts.E.gate.weight` is `published.E.gate_proj.weight`, as `parts` calls it."""
    return {
        f"{ours}.experts.{e}.{name}.weight": Source(f"{published}.{e}.{part}.weight")
        for e in range(config.router.num_experts)
        for name, part in parts.items()
    }


def stacked_sources(ours: str, config: ExpertsConfig, gate_up: str, down: str) -> dict[str, Source]:
    """Out of the tensors `gate_up` [E, 2F, C], gate first, and `down` [E, C, F]."""
    width, found = config.expert.width, {}
    for e in range(config.router.num_experts):
        found[f"{ours}.experts.{e}.gate.weight"] = Source(gate_up, at=e, rows=(0, width))
        found[f"{ours}.experts.{e}.up.weight"] = Source(gate_up, at=e, rows=(width, 2 * width))
        found[f"{ours}.experts.{e}.down.weight"] = Source(down, at=e)
    return found


def either_sources(
    ours: str, config: ExpertsConfig, names: Collection[str], mlp: str, parts: Mapping[str, str]
) -> dict[str, Source]:
    """`expert_sources` under `mlp`.experts, or where `names` has them `stacked_sources`."""
    stacked = f"{mlp}.experts.gate_up_proj"
    if stacked in names:
        return stacked_sources(ours, config, stacked, f"{mlp}.experts.down_proj")
    return expert_sources(ours, config, f"{mlp}.experts", parts)
