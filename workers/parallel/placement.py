"""Which rank of a gang holds which experts. Pure: no torch, no Ray, no files, no clock.

R ranks, E experts, N nodes. A slot is a place for one expert's weights of one layer in one rank's memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Topology:
    """Which ranks share a node: `node_of[rank]` numbers the rank's node, from 0, in the order of first appearance."""

    node_of: tuple[int, ...]

    def __post_init__(self) -> None:
        seen = list(dict.fromkeys(self.node_of))
        if not seen or seen != list(range(len(seen))):
            raise ValueError(f"a topology numbers nodes from 0 as they first appear, not {self.node_of}")

    @classmethod
    def of(cls, nodes: Iterable[object]) -> Topology:
        """From anything that names each rank's node: `Topology.of(["a", "a", "b"]) == Topology((0, 0, 1))`."""
        numbers: dict[object, int] = {}
        return cls(tuple(numbers.setdefault(node, len(numbers)) for node in nodes))

    @classmethod
    def even(cls, num_ranks: int, num_nodes: int = 1) -> Topology:
        """Ranks in order, as many on each node: `even(4, 2)` is (0, 0, 1, 1)."""
        if num_nodes < 1 or num_ranks % num_nodes:
            raise ValueError(f"{num_ranks} ranks don't spread evenly over {num_nodes} nodes")
        return cls(tuple(rank // (num_ranks // num_nodes) for rank in range(num_ranks)))

    @property
    def num_ranks(self) -> int:
        return len(self.node_of)

    @property
    def num_nodes(self) -> int:
        return max(self.node_of) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """`slots[i][rank]` are the experts that a rank holds of decoder layer `layers[i]`, in the order of its slots.

    Dense layers have no entry. In each layer every expert is held by at least one rank, and by any rank at most once;
    ranks may have different numbers of slots, or none. ValueError when that is not so.
    """

    num_experts: int
    layers: tuple[int, ...]
    slots: tuple[tuple[tuple[int, ...], ...], ...]

    def __post_init__(self) -> None:
        if len(self.slots) != len(self.layers) or list(self.layers) != sorted(set(self.layers)):
            raise ValueError("a placement names each of its layers once, in ascending order, with slots for each")
        if len({len(ranks) for ranks in self.slots}) > 1:
            raise ValueError("a placement has the same ranks in every layer")
        experts = set(range(self.num_experts))
        for layer, ranks in zip(self.layers, self.slots, strict=True):
            for rank, held in enumerate(ranks):
                if len(set(held)) != len(held):
                    raise ValueError(f"layer {layer}: rank {rank} holds an expert twice")
            held_somewhere = {expert for held in ranks for expert in held}
            if held_somewhere != experts:
                wrong = sorted(held_somewhere ^ experts)
                raise ValueError(f"layer {layer}: experts {wrong} are held nowhere or don't exist")

    @property
    def num_ranks(self) -> int:
        return len(self.slots[0]) if self.slots else 0

    def held(self, layer: int, rank: int) -> tuple[int, ...]:
        """The expert of each slot of a rank in a decoder layer; none in a dense one."""
        return self.slots[self.layers.index(layer)][rank] if layer in self.layers else ()

    def held_by(self, rank: int, num_layers: int) -> tuple[tuple[int, ...], ...]:
        """By decoder layer, the expert of each of a rank's slots: what `Decoder.load(experts=...)` takes."""
        return tuple(self.held(layer, rank) for layer in range(num_layers))

    def to_json(self) -> dict[str, Any]:
        return {
            "num_experts": self.num_experts,
            "layers": {
                str(layer): [list(held) for held in ranks] for layer, ranks in zip(self.layers, self.slots, strict=True)
            },
        }

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Placement:
        """ValueError when the document is not one that `to_json` made."""
        try:
            return cls(
                num_experts=int(document["num_experts"]),
                layers=tuple(int(layer) for layer in document["layers"]),
                slots=tuple(
                    tuple(tuple(int(expert) for expert in held) for held in ranks)
                    for ranks in document["layers"].values()
                ),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a placement: {json.dumps(document)[:80]} ({error})") from None


def round_robin(
    layers: Sequence[int], num_experts: int, num_ranks: int, slots_per_rank: int | None = None
) -> Placement:
    """Experts dealt out to ranks in turn, expert e to rank e mod R, as one does who knows nothing of loads.

    `slots_per_rank`: what each rank has room for. Spare slots are dealt out in turn too, a rank on each time round,
    so that a replica lands elsewhere than its expert. None: each expert is held once, and ranks have unequal numbers of
    slots if they must. ValueError when there is no room.
    """
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    if slots_per_rank is None:
        for expert in range(num_experts):
            ranks[expert % num_ranks].append(expert)
    else:
        check_room(num_experts, num_ranks, slots_per_rank)
        for turn in range(num_ranks * slots_per_rank):
            held, expert = ranks[turn % num_ranks], (turn + turn // num_experts) % num_experts
            if expert not in held:
                held.append(expert)
    same = tuple(tuple(held) for held in ranks)
    return Placement(num_experts=num_experts, layers=tuple(layers), slots=(same,) * len(layers))


def check_room(num_experts: int, num_ranks: int, slots_per_rank: int) -> None:
    if num_ranks < 1 or num_ranks * slots_per_rank < num_experts:
        raise ValueError(
            f"{num_ranks} ranks of {slots_per_rank} slots have no room for {num_experts} experts; "
            f"each needs at least {-(-num_experts // max(num_ranks, 1))}"
        )
