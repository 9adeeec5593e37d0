"""What a rank is told to join its gang: plain data, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from workers.parallel.placement import Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """`host` and `port` are the rendezvous'; `gang` names gang and generation; `placement` is a Placement's JSON.

    `nodes` names each rank's node. `calibrates`: before it takes rows, the gang measures which experts the
    job's prompts choose, and moves experts to where that says.
    """

    host: str
    port: int
    gang: str
    rank: int
    nodes: tuple[str, ...]
    placement: dict[str, Any]
    calibrates: bool = False

    @property
    def num_ranks(self) -> int:
        return len(self.nodes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seating:
    """What the coordinator decides for a gang when it knows on which nodes its ranks are; see `Seat`."""

    placement: Placement
    calibrates: bool = False


class GangBroken(Exception):
    """A rank died while the gang met or calibrated, or the sample broke the model: the gang is of no use any more."""
