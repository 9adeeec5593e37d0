"""What the controller counts while a job runs: for the progress bar now, for the report at the end."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from jobs.events import CommittedSplit, Lease, ReplicaDied, ReplicaResized, ShardId
from jobs.experts.expert_tally import ExpertTally
from jobs.history import History, run_record
from jobs.layout import Layout
from jobs.mourning import Mourning
from jobs.progress import Progress
from jobs.spec import JsonObject
from pipeline.index.manifest import Shard
from workers.assignment import ShardReport

WAITING_PHASE = "waiting for nodes"
SHOWN_EVERY_S = 0.5
KEPT_EVERY_S = 10.0

OnProgress = Callable[[Progress], None]


class Tally:
    """Counts of this run. Rows are those of commits, and those that shards have done and not yet handed over."""

    def __init__(
        self,
        *,
        rows_total: int,
        committed: Mapping[int, CommittedSplit],
        retry_errors: bool,
        on_progress: OnProgress | None,
        keep: Callable[[JsonObject], None],
    ) -> None:
        """`retry_errors`: failed rows count as not done until they were tried again.

        `keep` is given the record of this run now and then, and at its end.
        """
        self._on_progress = on_progress
        self._keep = keep
        self._kept_at = time.monotonic()
        self._rows_total = rows_total
        self._done = {index: split.rows - (split.errors if retry_errors else 0) for index, split in committed.items()}
        self._errors = {index: 0 if retry_errors else split.errors for index, split in committed.items()}
        self._rows_at_start = self._rows = sum(self._done.values())
        self._error_rows = sum(self._errors.values())
        self._reports: dict[ShardId, ShardReport] = {}
        self._gone: Counter[str] = Counter()  # totals of shards that are no more
        self._phase = "starting"
        self._phases: dict[str, float] = {}
        self._began_at = self._phase_at = time.monotonic()
        self._began_wall = time.time()
        self._running_at: float | None = None  # when the first shard was ready for rows
        self._shown_at = 0.0
        self._mourning = Mourning(self._began_at)
        self._first_steps: list[float] = []
        self._num_splits = 0
        self._layout: dict[str, Any] = {}
        self._index_trials: list[dict[str, Any]] = []
        self.experts = ExpertTally()
        self._history = History()
        self._started_at = time.strftime("%Y-%m-%dT%H:%M:%S%z")

    def lay_out(self, layout: Layout) -> None:
        """How many shards of what size the run has."""
        self._layout = {"replicas": layout.replicas, "ranks": layout.ranks, "why": layout.why}
        if layout.lacks:
            self.enter(WAITING_PHASE)

    def indexed(self, kind: str, shard: Shard, seconds: tuple[float, ...]) -> None:
        """A shard of an index was built, and searched in `seconds` with each of the efforts that were tried."""
        self._index_trials += [
            {
                "kind": kind,
                "shard": shard.file,
                "effort": trial.effort,
                "recall": trial.recall,
                "seconds": round(took, 4),
            }
            for trial, took in zip(shard.trials, seconds, strict=True)
        ]

    def enter(self, phase: str) -> None:
        self._history.add(self.progress())
        now = time.monotonic()
        self._phases[self._phase] = self._phases.get(self._phase, 0.0) + now - self._phase_at
        self._phase, self._phase_at = phase, now
        self.show(at_once=True)

    def take(self, shard: ShardId, report: ShardReport) -> None:
        self._reports[shard] = report
        self.experts.take(shard, report)
        if report.phase == "loading" and self._phase in ("starting", WAITING_PHASE):
            self.enter("loading the model")
        if report.phase != "running":
            return
        if self._running_at is None:
            self._running_at = time.monotonic()
            self.enter("rows")
        self._mourning.is_ready(shard.replica, time.monotonic(), stepped=report.first_step_at is not None)

    def grant(self, shard: ShardId, lease: Lease) -> None:
        self._mourning.grant(shard, lease.split)

    def resize(self, event: ReplicaResized) -> None:
        self._mourning.resize(event)

    def mourn(self, death: ReplicaDied) -> None:
        self._mourning.mourn(death, time.monotonic())
        for shard in [shard for shard in self._reports if shard.replica == death.replica]:
            report = self._reports.pop(shard)
            self._gone.update(_totals(report))
            self._first_steps += [report.first_step_at] if report.first_step_at else []

    def commit(self, split: int, *, rows: int, errors: int) -> None:
        self._rows += rows - self._done.get(split, 0)
        self._error_rows += errors - self._errors.get(split, 0)
        self._done[split], self._errors[split] = rows, errors
        self._num_splits += 1
        self._mourning.commit(split)

    def show(self, *, at_once: bool = False) -> None:
        now = time.monotonic()
        if at_once or now - self._shown_at >= SHOWN_EVERY_S:
            self._shown_at = now
            progress = self.progress()
            self._history.add(progress)
            if self._on_progress is not None:
                self._on_progress(progress)
            if now - self._kept_at >= KEPT_EVERY_S:
                self.keep()

    def keep(self) -> None:
        """Have the record of this run written down as it is now."""
        self._kept_at = time.monotonic()
        self._keep(run_record(self._history.samples(), self._started_at, self.facts()))

    def progress(self) -> Progress:
        totals = self._all_totals()
        unreported = sum(report.counts.unreported_rows for report in self._reports.values())
        return Progress(
            phase=self._phase,
            rows_done=min(self._rows + unreported, self._rows_total),
            rows_total=self._rows_total,
            rows_at_start=self._rows_at_start,
            error_rows=self._error_rows,
            prompt_tokens=int(totals["prompt_tokens"] + totals["embedded_tokens"]),
            completion_tokens=int(totals["completion_tokens"]),
            elapsed_s=time.monotonic() - self._running_at if self._running_at is not None else 0.0,
        )

    def facts(self) -> dict[str, Any]:
        """For the report: how this run went, apart from what its parts say."""
        now = time.monotonic()
        phases = {**self._phases, self._phase: self._phases.get(self._phase, 0.0) + now - self._phase_at}
        totals = self._all_totals()
        first_steps = self._first_steps + [r.first_step_at for r in self._reports.values() if r.first_step_at]
        return {
            "seconds": {phase: round(seconds, 3) for phase, seconds in phases.items()},
            "first_step_at": min(first_steps, default=None),  # seconds since 1970
            "first_token_s": round(min(first_steps) - self._began_wall, 3) if first_steps else None,
            "layout": self._layout,
            "index_trials": self._index_trials,
            "splits_committed": self._num_splits,
            **self._mourning.facts(),
            "embedded_tokens": int(totals["embedded_tokens"]),
            "engine": {name: round(value, 3) for name, value in totals.items() if name not in _OWN_COUNTS},
        }

    def _all_totals(self) -> Counter[str]:
        totals = Counter(self._gone)
        for report in self._reports.values():
            totals.update(_totals(report))
        return totals


_OWN_COUNTS = ("prompt_tokens", "completion_tokens", "embedded_tokens")


def _totals(report: ShardReport) -> dict[str, Any]:
    return {name: getattr(report.counts, name) for name in _OWN_COUNTS} | report.engine
