"""The Ray actor that holds one decoder shard: a thin shell that loads what its settings say and runs it."""

from __future__ import annotations

import gc
import logging
import threading
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

import ray

from pipeline.errors import JobError, UserError
from workers.assignment import Assignment, Failure, ShardReport
from workers.engine_factory import LoadedEngine
from workers.job_runner import build_runner
from workers.parallel.seat import GangBroken, Seat
from workers.row_runner import RowRunner
from workers.run_log import log_crashes, run_log
from workers.sentry import Sentry
from workers.settings import JobSettings, JsonObject, ShardSettings, load_callable

log = logging.getLogger(__name__)


class ShardActor:
    """Answers reports from the moment that its process is up; the model is loaded and run in a thread of its own.

    One of several ranks begins to load when it is given its seat in the gang, which says what experts it holds. A shard
    whose job came to its end in peace (a last report that says `is_free`) may be given another.
    """

    def __init__(self, settings: ShardSettings, name: str, *, awaits_seat: bool) -> None:
        self._sentry = Sentry()
        self._engine = settings.engine
        self._node = ray.get_runtime_context().get_node_id()
        self._jobs: SimpleQueue[tuple[JobSettings, str]] = SimpleQueue()
        self._turn = 0  # jobs that were begun before this one
        self._runner: RowRunner | None = None
        self._failure: Failure | None = None
        self._calibrated: JsonObject | None = None
        self._ready = threading.Event()
        self._stopped = False
        self._jobs.put((settings.job, name))
        log_crashes(Path(settings.job.out))
        if not awaits_seat:
            self._begin()

    def take_seat(self, seat: Seat) -> None:
        self._engine = replace(self._engine, seat=seat)
        self._begin()

    def take_job(self, job: JobSettings, name: str, turn: int) -> None:
        """The next job, when the one before is over."""
        self._runner, self._failure, self._calibrated, self._stopped = None, None, None, False
        self._ready.clear()
        self._turn = turn
        self._jobs.put((job, name))

    def grant(self, assignments: list[Assignment]) -> None:
        self._running().grant(assignments)

    def revoke(self, index: int, revision: int) -> None:
        self._running().revoke(index, revision)

    def stop(self) -> None:
        self._stopped = True
        if self._runner is not None:
            self._runner.stop()

    def report(self, timeout_s: float, turn: int) -> ShardReport:
        """Of the job that is the `turn`th, counted from 0."""
        if self._ready.wait(timeout_s) and self._runner is not None and self._turn == turn:
            calibrated, self._calibrated = self._calibrated, None
            return replace(self._runner.report(timeout_s), node=self._node, calibrated=calibrated)
        ended = self._turn == turn and (self._stopped or self._failure is not None)
        return ShardReport(
            phase="stopped" if ended else "loading",
            received=0,
            wanted=0,
            node=self._node,
            failure=self._failure if ended else None,
        )

    def _note_calibration(self, found: JsonObject) -> None:
        self._calibrated = found

    def _begin(self) -> None:
        threading.Thread(target=self._run, name="shard", daemon=True).start()

    def _running(self) -> RowRunner:
        assert self._runner is not None, "assignments are granted when a loaded shard asks for them"
        return self._runner

    def _run(self) -> None:
        """One thread for all jobs: what torch and the kernels were told of threads, they were told in it."""
        loaded: LoadedEngine | None = None
        while True:
            job, name = self._jobs.get()
            with run_log(Path(job.out), name):
                loaded = self._run_job(loaded, job)
            if loaded is None:
                return

    def _run_job(self, loaded: LoadedEngine | None, job: JobSettings) -> LoadedEngine | None:
        """-> the engine, for the next job; None where it is of no use any more."""
        runner = None
        try:
            is_first = loaded is None
            if loaded is None:
                loaded = load_callable(self._engine.factory)(self._engine)
            else:
                log_crashes(Path(job.out))
                loaded.engine.clear_stats()
            assert loaded is not None
            runner = build_runner(loaded, self._engine, job, on_calibrated=self._note_calibration if is_first else None)
        except UserError as error:
            self._failure = Failure(kind="user", message=str(error))
        except JobError as error:
            self._failure = Failure(kind="job", message=str(error))
        except GangBroken as error:
            log.exception("the gang broke")
            self._failure = Failure(kind="crash", message=str(error))
        except Exception as error:
            log.exception("the model could not be loaded")
            self._failure = Failure(kind="job", message=f"loading the model failed: {type(error).__name__}: {error}")
        else:
            # Rows make many small objects that never refer in circles; what is loaded stays as long as the process.
            gc.freeze()
            gc.set_threshold(20_000, 50, 50)
            self._runner = runner
            if self._stopped:
                runner.stop()
        self._sentry.leave()
        self._ready.set()
        if runner is None:
            return None
        runner.run()
        return loaded if runner.is_free else None
