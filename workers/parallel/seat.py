"""What a rank is told to join its gang: plain data, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """`host` and `port` are the rendezvous'; `gang` names gang and generation; `placement` is a Placement's JSON.

    `nodes` names each rank's node.
    """

    host: str
    port: int
    gang: str
    rank: int
    nodes: tuple[str, ...]
    placement: dict[str, Any]

    @property
    def num_ranks(self) -> int:
        return len(self.nodes)
