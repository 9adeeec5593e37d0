"""The Ray actor that holds one decoder shard: a thin shell that loads what its settings say and runs it."""

from __future__ import annotations

import faulthandler
import logging
import threading
from pathlib import Path

from pipeline.errors import JobError, UserError
from pipeline.job_folder import JobFolder
from pipeline.prompts import PromptBuilder
from pipeline.records import RecordLayout
from pipeline.source import Source
from workers.assignment import Assignment, Failure, ShardReport
from workers.engine_factory import LoadedEngine
from workers.preparation import Preparation, TextKind
from workers.row_runner import RowRunner
from workers.settings import ShardSettings, load_callable

log = logging.getLogger(__name__)


class ShardActor:
    """Answers reports from the moment that its process is up; the model is loaded and run in a thread of its own."""

    def __init__(self, settings: ShardSettings, name: str) -> None:
        self._settings = settings
        _log_to(Path(settings.out), name)
        self._runner: RowRunner | None = None
        self._failure: Failure | None = None
        self._loaded = threading.Event()
        self._stopped = False
        threading.Thread(target=self._run, name="shard", daemon=True).start()

    def grant(self, assignments: list[Assignment]) -> None:
        self._running().grant(assignments)

    def revoke(self, index: int, revision: int) -> None:
        self._running().revoke(index, revision)

    def stop(self) -> None:
        self._stopped = True
        if self._runner is not None:
            self._runner.stop()

    def report(self, timeout_s: float) -> ShardReport:
        if self._loaded.wait(timeout_s) and self._runner is not None:
            return self._runner.report(timeout_s)
        ended = self._stopped or self._failure is not None
        return ShardReport(phase="stopped" if ended else "loading", received=0, wanted=0, failure=self._failure)

    def _running(self) -> RowRunner:
        assert self._runner is not None, "assignments are granted when a loaded shard asks for them"
        return self._runner

    def _run(self) -> None:
        try:
            runner = build_runner(self._settings)
        except UserError as error:
            self._failure = Failure(kind="user", message=str(error))
        except JobError as error:
            self._failure = Failure(kind="job", message=str(error))
        except Exception as error:
            log.exception("the model could not be loaded")
            self._failure = Failure(kind="job", message=f"loading the model failed: {type(error).__name__}: {error}")
        else:
            self._runner = runner
            if self._stopped:
                runner.stop()
        self._loaded.set()
        if self._runner is not None:
            self._runner.run()


