"""What comes after the last commit: the index, the audit and the report, each from the committed parts alone."""

from __future__ import annotations

from typing import Any

from jobs.embedding import job_provenance
from jobs.experts.expert_record import ExpertRecord
from jobs.report import write_report
from jobs.spec import JsonObject
from jobs.store import JobStore
from jobs.tally import Tally
from pipeline.audit import audit
from pipeline.index.build import build_index, index_is_current
from pipeline.index.kinds import DEFAULT_MEMORY_BYTES, refuse_unknown
from pipeline.index.manifest import Provenance
from pipeline.index.rebuilding import kept_changes
from workers.index_builders import builders_at_hand


class Finisher:
    """Each step may be done again at any time: a crash in it leaves the job as if the step had not begun."""

    def __init__(self, store: JobStore, tally: Tally, *, processors_are_held: bool = False) -> None:
        """`processors_are_held`: by replicas of ours that stay when the rows are done."""
        self._store = store
        self._tally = tally
        self._experts = ExpertRecord(store.folder)
        self._processors_are_held = processors_are_held
        self.written_report: JsonObject | None = None

    def refuse_unknown_kind(self) -> None:
        """UserError where the job names a kind of index that there is none of: before its rows are run, not after."""
        if self._store.job.spec.index is not None:
            refuse_unknown(self._store.job.spec.index.kind)

    def index_is_current(self) -> bool:
        """True also for a job that has none."""
        if self._store.job.spec.index is None:
            return True
        return index_is_current(self._store.folder, self._store.log.commits, **self._index_arguments())

    def ensure_index(self) -> None:
        if not self.index_is_current():
            arguments = self._index_arguments()
            builders = builders_at_hand(
                self._store.job.spec.cluster.labels, processors_are_held=self._processors_are_held
            )
            build_index(
                self._store.folder,
                self._store.log.commits,
                **arguments,
                builders=builders,
                on_shard=self._tally.indexed,
                change=kept_changes(self._store.folder, memory_bytes=arguments["memory_bytes"], builders=builders),
            )

    def audit(self) -> tuple[str, ...]:
        return tuple(audit(self._store.folder.root).problems)

    def report(self) -> None:
        self.keep_counts()
        self.written_report = write_report(self._store.folder.root)

    def keep_counts(self) -> None:
        """What this run counted, for the reports of later runs too."""
        self._tally.keep()
        self._experts.keep(self._tally.experts.gangs)

    def _index_arguments(self) -> dict[str, Any]:
        spec = self._store.job.spec
        assert spec.index is not None
        assert spec.embed is not None
        return {
            "job": spec.name,
            "provenance": self._provenance(),
            "kind": spec.index.kind,
            "shards": None if spec.index.shards == "auto" else spec.index.shards,
            "memory_bytes": DEFAULT_MEMORY_BYTES if spec.index.memory_bytes == "auto" else spec.index.memory_bytes,
            "recall": spec.index.recall,
            "center": spec.embed.center is True,
        }

    def _provenance(self) -> Provenance:
        job = self._store.job
        return job_provenance(job.spec, model_files=job.covers["model"], model_path=job.model_path)
