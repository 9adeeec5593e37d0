"""experts.json: what experts did in the runs so far, kept for the report at the end of each run, however it ends."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from functools import partial

from jobs.experts.expert_report import expert_report
from jobs.experts.expert_tally import GangWork
from jobs.experts.placements import record_of
from jobs.spec import JsonObject
from pipeline.durable import replace_file, storage_errors
from pipeline.errors import JobError
from pipeline.job_folder import JobFolder

log = logging.getLogger(__name__)


class ExpertRecord:
    """Begun before the run that adds to it."""

    def __init__(self, folder: JobFolder) -> None:
        self._folder = folder
        self._earlier = read_experts(folder)

    def keep(self, gangs: Sequence[GangWork]) -> None:
        """Add what this run's gangs did; what it kept before gives way. If the storage fails, the log says so."""
        experts = expert_report(self._earlier, gangs, partial(record_of, self._folder))
        if experts is None:
            return
        try:
            with storage_errors("writing", self._folder.experts_file):
                content = json.dumps(experts).encode()
                replace_file(self._folder.experts_file, content, drafts=self._folder.attempts)
        except JobError as error:
            log.warning("what experts did in this run is not kept: %s", error)


def read_experts(folder: JobFolder) -> JsonObject | None:
    """As `expert_report` made it. None where there is none, or something else wrote it: it only says how it went."""
    try:
        experts = json.loads(folder.experts_file.read_bytes())
    except (OSError, ValueError):
        return None
    return experts if isinstance(experts, dict) and {"layers", "rows", "gangs"} <= experts.keys() else None
