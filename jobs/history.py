"""How a run went over time: samples at even distances, bounded in number, and kept in the job directory as it goes.

runs.json holds a record of each run, the one at work too, so that what a killed run did is not forgotten.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Final

from jobs.progress import ROWS_PHASE, Progress
from jobs.spec import JsonObject
from pipeline.durable import replace_file, storage_errors
from pipeline.errors import JobError
from pipeline.job_folder import JobFolder

MAX_SAMPLES: Final = 400
MAX_RUNS: Final = 100
FULL_RUNS: Final = 10  # the latest; of earlier ones fewer samples are kept
FEW_SAMPLES: Final = 40

log = logging.getLogger(__name__)


class History:
    """Progress reports at least `spacing_s` apart, each phase's last, and the latest. Of too many every second goes."""

    def __init__(self, max_samples: int = MAX_SAMPLES) -> None:
        self._max_samples = max_samples
        self._kept: list[Progress] = []
        self._latest: Progress | None = None
        self.spacing_s = 0.0

    def add(self, progress: Progress) -> None:
        before, self._latest = self._latest, progress
        if before is not None:
            if progress.phase != before.phase:
                if self._kept[-1] is not before:
                    self._kept.append(before)  # a phase's last, which says what came of it
            elif progress.elapsed_s < self._kept[-1].elapsed_s + self.spacing_s:
                return
        self._kept.append(progress)
        if len(self._kept) > self._max_samples:
            self._kept = [
                sample
                for place, (sample, after) in enumerate(pairwise([*self._kept, self._kept[-1]]))
                if place % 2 == 0 or sample.phase != after.phase
            ]
            self.spacing_s = (self._kept[-1].elapsed_s - self._kept[0].elapsed_s) / (len(self._kept) - 1)

    def samples(self) -> list[Progress]:
        """In order, the latest last."""
        if self._latest is None or self._kept[-1] is self._latest:
            return list(self._kept)
        return [*self._kept, self._latest]


def run_record(samples: Sequence[Progress], started_at: str, facts: Mapping[str, Any]) -> JsonObject:
    """How one run of the controller went. `started_at`: ISO 8601. `facts`: what else the controller knows of it.

    Times are of rows alone: from when the first could start until the index is begun. `series` has what was counted by
    each of `seconds` since then.
    """
    running = [progress for progress in samples if progress.phase == ROWS_PHASE] or list(samples[-1:])
    last = running[-1]
    return {
        "started_at": started_at,
        "elapsed_s": round(last.elapsed_s, 3),
        "rows": last.rows_done - last.rows_at_start,
        "prompt_tokens": last.prompt_tokens,
        "completion_tokens": last.completion_tokens,
        "tokens_per_s": round(last.tokens_per_s, 1),
        "series": {
            "seconds": [round(progress.elapsed_s, 3) for progress in running],
            "rows": [progress.rows_done - progress.rows_at_start for progress in running],
            "prompt_tokens": [progress.prompt_tokens for progress in running],
            "completion_tokens": [progress.completion_tokens for progress in running],
        },
        **facts,
    }


class RunRecords:
    """runs.json: the records of the runs so far, the latest MAX_RUNS of them, and of the one that writes here."""

    def __init__(self, folder: JobFolder) -> None:
        self._folder = folder
        earlier = read_runs(folder)[-MAX_RUNS + 1 :]
        full = max(len(earlier) - FULL_RUNS + 1, 0)
        self._earlier = [_thinned(run) for run in earlier[:full]] + earlier[full:]

    def keep(self, record: JsonObject) -> None:
        """Put the record in the place of this run's last. If the storage fails, the log says so and the run goes on."""
        content = json.dumps({"runs": [*self._earlier, record]}).encode()
        try:
            with storage_errors("writing", self._folder.runs_file):
                replace_file(self._folder.runs_file, content, drafts=self._folder.attempts)
        except JobError as error:
            log.warning("how fast this run goes is not kept: %s", error)


def read_runs(folder: JobFolder) -> list[JsonObject]:
    """Empty where the file is missing, or something else wrote it: it only says how fast things went."""
    try:
        runs = json.loads(folder.runs_file.read_bytes())["runs"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [run for run in runs if _is_record(run)] if isinstance(runs, list) else []


def _is_record(run: object) -> bool:
    return (
        isinstance(run, dict)
        and isinstance(run.get("series"), dict)
        and {"started_at", "elapsed_s", "rows", "prompt_tokens", "completion_tokens", "tokens_per_s"} <= run.keys()
    )


def _thinned(run: JsonObject) -> JsonObject:
    """With about FEW_SAMPLES samples, the last among them."""

    def few(values: list[Any]) -> list[Any]:
        return [*values[: -1 : max(1, len(values) // FEW_SAMPLES)], *values[-1:]]

    return run | {"series": {name: few(values) for name, values in run["series"].items()}}
