"""What the job's state machine hears and what it orders: plain values, each an event or an action."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple


class ShardId(NamedTuple):
    """`generation` counts how often the replica was formed; what comes from an earlier one is late."""

    replica: int
    generation: int
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """Rows [start, stop) of a split, to become its part of this revision.

    With `revision` above 0 the committed part is the base: its other rows are copied, and with `retry_errors` those of
    its rows in [start, stop) that did not fail. `condemned`: the row at `start` kills workers and is not run.
    """

    split: int
    revision: int
    start: int
    stop: int
    retry_errors: bool = False
    condemned: bool = False
    alone: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A lease's attempt. `rows` and `errors` count input rows of the whole part; `path` is the attempt's file."""

    split: int
    revision: int
    start: int
    stop: int
    rows: int
    errors: int
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CommittedSplit:
    """What the commits said about a split when the run began."""

    revision: int
    rows: int
    errors: int


@dataclass(frozen=True, slots=True)
class Outcome:
    kind: Literal["done", "failed", "interrupted"]
    message: str = ""
    is_user_error: bool = False


# Events


@dataclass(frozen=True, slots=True)
class Started:
    pass


@dataclass(frozen=True, slots=True)
class ShardHungry:
    """A shard that has `received` leases since it began would take `wanted` more."""

    shard: ShardId
    received: int
    wanted: int


@dataclass(frozen=True, slots=True)
class AttemptFinished:
    shard: ShardId
    result: Result


@dataclass(frozen=True, slots=True)
class Committed:
    result: Result


@dataclass(frozen=True, slots=True)
class Published:
    result: Result


@dataclass(frozen=True, slots=True)
class ReplicaDied:
    """`silent_s`: how long ago the shard that was lost had last been heard; None if it never was, or is not known."""

    replica: int
    generation: int
    reason: str
    silent_s: float | None = None


@dataclass(frozen=True, slots=True)
class ReplicaResized:
    """The replica forms with so many ranks from now on. 0: there is no room for any, and it waits for some."""

    replica: int
    generation: int
    ranks: int
    reason: str


@dataclass(frozen=True, slots=True)
class Failed:
    """Something that no retry mends: the model can't be loaded, the disk is full."""

    message: str
    is_user_error: bool = False


@dataclass(frozen=True, slots=True)
class StopRequested:
    pass


@dataclass(frozen=True, slots=True)
class ReplicasStopped:
    pass


@dataclass(frozen=True, slots=True)
class IndexReady:
    pass


@dataclass(frozen=True, slots=True)
class Audited:
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Reported:
    pass


Event = (
    Started
    | ShardHungry
    | AttemptFinished
    | Committed
    | Published
    | ReplicaDied
    | ReplicaResized
    | Failed
    | StopRequested
    | ReplicasStopped
    | IndexReady
    | Audited
    | Reported
)

# Actions


@dataclass(frozen=True, slots=True)
class StartReplica:
    replica: int
    generation: int


@dataclass(frozen=True, slots=True)
class Grant:
    shard: ShardId
    lease: Lease


@dataclass(frozen=True, slots=True)
class Revoke:
    """The shard may drop this lease: another's attempt was committed."""

    shard: ShardId
    split: int
    revision: int


@dataclass(frozen=True, slots=True)
class Commit:
    result: Result


@dataclass(frozen=True, slots=True)
class Publish:
    result: Result


@dataclass(frozen=True, slots=True)
class Discard:
    """The attempt came too late to count; its file may go."""

    result: Result


@dataclass(frozen=True, slots=True)
class StopReplicas:
    """Take in the attempts that are finished, then end every shard."""


@dataclass(frozen=True, slots=True)
class EnsureIndex:
    pass


@dataclass(frozen=True, slots=True)
class Audit:
    pass


@dataclass(frozen=True, slots=True)
class WriteReport:
    pass


@dataclass(frozen=True, slots=True)
class Finish:
    outcome: Outcome


Action = (
    StartReplica
    | Grant
    | Revoke
    | Commit
    | Publish
    | Discard
    | StopReplicas
    | EnsureIndex
    | Audit
    | WriteReport
    | Finish
)
