"""The Python interface: `jobs.client.run(spec)` runs a job, or resumes it, and returns its result."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.dataset as ds

from jobs.controller import Controller
from jobs.finishing import Finisher
from jobs.fleet import Fleet
from jobs.history import RunRecords
from jobs.planned_index import refuse_unbuildable
from jobs.spec import JobSpec, JsonObject
from jobs.specfile import load_spec, parse_spec
from jobs.state import JobState
from jobs.stop_signals import is_echo
from jobs.store import JobStore, open_store
from jobs.submitting.submission import note_submission
from jobs.tally import OnProgress, Tally
from jobs.warm import WarmReplicas
from jobs.worker_settings import worker_settings
from pipeline.errors import JobError, UserError
from workers import devices
from workers.run_log import run_log
from workers.settings import DEFAULT_ENGINE, EngineSettings

if TYPE_CHECKING:
    from jobs.index.query import QueryResult
    from jobs.index.served import ServedIndex
    from workers.forecast import Forecast


class JobInterrupted(KeyboardInterrupt):
    """The job was asked to stop. What is committed is kept, and running it again goes on from there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """A job that is done: its directory, and what its report says."""

    out: Path
    report: JsonObject

    def dataset(self) -> ds.Dataset:
        """The committed parts, in the order of rows."""
        return ds.dataset(sorted((self.out / "parts").glob("*.parquet")), format="parquet")

    def search(self, texts: Sequence[str], k: int = 10, *, filter: str | None = None) -> list[QueryResult]:
        """The k rows nearest to each text, of those that `filter` means, best first.

        UserError if the job made no index, or the filter is not understood (see `pipeline.index.expression`).
        """
        from jobs.index.query import query_texts

        return query_texts(self.out, texts, k, filter=filter)


def connect(index: str | Path, address: str | None = None) -> ServedIndex:
    """A client of an index that `gristmill serve-index` serves: `with connect(...) as index: index.search(texts, k)`.

    `index` is the job directory or the name that it is served as; `address` is the Ray's, else RAY_ADDRESS or the Ray
    that is connected. UserError where it is not served there.
    """
    from jobs.index import served

    return served.connect(index, address)


def run(
    job: JobSpec | Mapping[str, Any] | str | Path,
    *,
    limit: int | None = None,
    retry_errors: bool = False,
    on_progress: OnProgress | None = None,
    engine_factory: str = DEFAULT_ENGINE,
    warm: WarmReplicas | None = None,
) -> JobResult:
    """Run a job (a spec, its settings, or a job file) to its end, or from where it stopped.

    `limit`: only the first rows, for now. `retry_errors`: failed rows run again. A job that is done is left alone.
    `engine_factory`: `module:callable` that makes a worker's engine (see `workers.engine_factory`). `warm`: keeps
    Ray and loaded models, for the next job that is run with it.

    UserError if the job can't be run as asked, JobError if it fails, JobInterrupted on SIGINT and SIGTERM; all keep
    what is committed. Uses the Ray that is connected, or else starts one for itself.
    """
    if isinstance(job, JobSpec):
        spec = job
    else:
        spec = parse_spec(job) if isinstance(job, Mapping) else load_spec(job)
    with open_store(spec) as store, run_log(store.folder.root, "controller"):
        note_submission(store.folder)
        try:
            return _run(store, limit, retry_errors, on_progress, engine_factory, warm)
        except JobInterrupted:
            raise
        except KeyboardInterrupt as stop:  # as which Ray passes on what a handler raises in its calls
            raise JobInterrupted from stop


def _run(
    store: JobStore,
    limit: int | None,
    retry_errors: bool,
    on_progress: OnProgress | None,
    engine_factory: str,
    warm: WarmReplicas | None,
) -> JobResult:
    spec, committed = store.job.spec, store.committed()

    def new_state(num_replicas: int, ranks: int) -> JobState:
        return JobState(
            [split.num_rows for split in store.job.splits],
            committed,
            num_replicas=num_replicas,
            ranks=ranks,
            max_error_rate=spec.limits.max_error_rate,
            limit=limit,
            retry_errors=retry_errors,
            indexes=spec.index is not None,
        )

    state = new_state(1, 1)
    tally = Tally(
        rows_total=state.total_rows,
        committed=committed,
        retry_errors=retry_errors,
        on_progress=on_progress,
        keep=RunRecords(store.folder).keep,
    )
    finisher = Finisher(store, tally, processors_are_held=warm is not None)
    finisher.refuse_unknown_kind()
    report = store.report()
    if not state.num_open and report is not None and finisher.index_is_current():
        return JobResult(out=store.folder.root, report=report)
    if engine_factory == DEFAULT_ENGINE:
        refuse_unbuildable(store.job)
    rows_to_do = state.total_rows - sum(split.rows for split in committed.values())
    settings = worker_settings(store, engine_factory, rows_to_do=rows_to_do)
    with _stopping() as stopping, Fleet(settings, spec.cluster, model=store.job.covers["model"], warm=warm) as fleet:
        layout = fleet.lay_out(partial(_forecast, settings.engine) if engine_factory == DEFAULT_ENGINE else None)
        tally.lay_out(layout)
        state = new_state(layout.replicas, layout.ranks)
        controller = Controller(store, state, fleet, finisher, tally)
        stopping.append(controller)
        outcome = controller.run()
        if outcome.kind != "done":
            finisher.keep_counts()
    if outcome.kind == "interrupted":
        raise JobInterrupted
    if outcome.kind == "failed":
        raise (UserError if outcome.is_user_error else JobError)(outcome.message)
    assert finisher.written_report is not None
    return JobResult(out=store.folder.root, report=finisher.written_report)


def _forecast(engine: EngineSettings, device: str) -> Forecast:
    """Of one shard. For GPUs that only other machines have, it is what bfloat16 takes there unless told otherwise."""
    from workers.forecast import forecast  # brings torch, a second or two

    if device == "cuda" and devices.gpu_bytes() is None:
        dtype = "bfloat16" if engine.dtype == "auto" else engine.dtype
        return forecast(replace(engine, device="cpu", dtype=dtype), measures=False)
    return forecast(replace(engine, device=device), measures=False)


@contextmanager
def _stopping() -> Iterator[list[Controller]]:
    """SIGINT and SIGTERM stop the controller that is put into the list.

    What is not worth waiting for (Ray's start, an index, an audit) ends at once. A second signal does not wait for the
    workers either. Signals are only handled in the main thread.
    """
    running: list[Controller] = []
    if threading.current_thread() is not threading.main_thread():
        yield running
        return
    asked = False

    def on_signal(number: int, frame: Any) -> None:
        nonlocal asked
        if is_echo():
            return
        if asked or not any(controller.is_running_rows for controller in running):
            raise JobInterrupted
        asked = True
        running[0].stop()

    before: dict[int, Callable[..., Any] | int | None] = {
        number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield running
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
