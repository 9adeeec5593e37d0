"""What passes between the controller and a shard: plain values, told without Ray or torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from workers.parallel.expert_work import ExpertWork
from workers.settings import JsonObject


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The committed part that the next revision starts from."""

    part: str  # its file's name in parts/
    sha256: str
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """Rows [start, stop) of a split, counted from the split's first row, to be written as a part of this revision.

    The part holds the split's first `stop` rows, or as many as `base` does if those are more. Its other rows are
    copied from `base`; so are, unless `retry_errors`, the rows in [start, stop) that `base` has. `condemned`: the row
    at `start` kills workers, and becomes an error row without being run.
    """

    split: JsonObject  # pipeline.source.Split as JSON
    revision: int
    start: int
    stop: int
    base: Base | None = None
    retry_errors: bool = False
    condemned: bool = False

    @property
    def index(self) -> int:
        return int(self.split["index"])

    @property
    def first_row(self) -> int:
        return int(self.split["first_row"])

    @property
    def num_rows(self) -> int:
        """Rows of the part that comes of this."""
        return max(self.stop, self.base.rows if self.base else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedAssignment:
    index: int
    revision: int
    start: int
    stop: int
    attempt: JsonObject  # pipeline.attempt.Attempt as JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What a shard did since it began. `unreported_rows` are done, and in none of the finished assignments."""

    unreported_rows: int = 0
    error_rows: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    embedded_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a shard gave up. `user` and `job` end the job with this line; `crash` is as if it had died."""

    kind: Literal["user", "job", "crash"]
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardReport:
    """A shard's answer to each poll; that it comes at all is its heartbeat."""

    phase: Literal["loading", "running", "stopped"]
    received: int  # assignments since it began
    wanted: int  # assignments it would take now
    finished: tuple[FinishedAssignment, ...] = ()
    counts: Counts = field(default_factory=Counts)
    failure: Failure | None = None
    node: str = ""  # Ray's name of the node that the shard is on
    first_step_at: float | None = None  # when the engine's first step with work was done, in seconds since 1970
    engine: JsonObject = field(default_factory=dict)  # the engine's own statistics
    calibrated: JsonObject | None = None  # once, of a gang's first rank: a `calibrator.Calibration` as JSON
    is_free: bool = False  # in the last report: nothing is left in its engine, which may take another job
    experts: ExpertWork | None = None  # now and then, and in the last report, of a model that has experts
