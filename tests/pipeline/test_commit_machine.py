"""Whatever happens in whatever order, a split is committed at most once a revision and nothing committed is lost."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from pipeline.attempt import Attempt
from pipeline.commits import Commit, CommitLog, read_commits
from pipeline.durable import file_sha256
from pipeline.errors import JobError
from pipeline.job_folder import JobFolder
from pipeline.parts import PartBuilder
from pipeline.records import RecordLayout

NUM_SPLITS = 3
splits = st.integers(0, NUM_SPLITS - 1)


class Commits(RuleBasedStateMachine):
    """Attempts are written by several workers, committed by one controller that may die at any step of the filesystem.

    `_known` is what a reader could have seen committed: revision and hash of each split.
    """

    attempts: Bundle[Attempt] = Bundle("attempts")
    filesystem: Any

    @initialize()
    def start(self) -> None:
        self._root = Path(tempfile.mkdtemp())
        self._folder = JobFolder(self._root / "out")
        self._texts = 0
        self._known: dict[int, tuple[int, str]] = {}
        self._reopen()

    def teardown(self) -> None:
        shutil.rmtree(self._root, ignore_errors=True)

    def _reopen(self) -> None:
        self._log = CommitLog(self._folder, fingerprint="this job")
        self._log.recover()

    @rule(target=attempts, split=splits, lag=st.integers(-1, 1))
    def write_attempt(self, split: int, lag: int) -> Attempt:
        """By a worker that may think that the split is at another revision than it is."""
        revision = max(self._log.next_revision(split) + lag, 0)
        layout = RecordLayout.of(samples=1, embeds=None)
        builder = PartBuilder(layout, split=split, first_row=split, num_rows=1, revision=revision)
        self._texts += 1
        builder.add(split, text=f"{self._texts}", finish_reason="stop", prompt_tokens=1, completion_tokens=1)
        return builder.write(self._folder)

    @rule(attempt=attempts, publish=st.booleans())
    def commit(self, attempt: Attempt, publish: bool) -> None:
        expected = self._log.next_revision(attempt.split) == attempt.revision
        there = (self._folder.root / attempt.path).exists()
        if expected and there:
            commit = self._log.commit(attempt)
            self._saw(commit)
            if publish:
                self._log.publish(commit)
        else:
            with pytest.raises(JobError):
                self._log.commit(attempt)

    @rule(split=splits)
    def publish(self, split: int) -> None:
        """Late, or once more."""
        if split in self._log.commits:
            self._log.publish(self._log.commits[split])

    @rule(attempt=attempts, step=st.integers(0, 12))
    def die_committing(self, attempt: Attempt, step: int) -> None:
        with self.filesystem.dies_at(step), suppress(JobError):
            self._log.publish(self._log.commit(attempt))
        self._recover_after(attempt)

    @rule(step=st.integers(0, 12))
    def die_recovering(self, step: int) -> None:
        with self.filesystem.dies_at(step):
            self._reopen()
        self._check_parts()
        self._reopen()

    @rule()
    def restart(self) -> None:
        self._reopen()
        assert self._committed() == self._known

    def _recover_after(self, attempt: Attempt) -> None:
        """The attempt under way when the process died became real or did not; nothing else changed."""
        self._check_parts()
        self._reopen()
        now = self._committed()
        changed = {split for split in now if now[split] != self._known.get(split)}
        assert changed <= {attempt.split}
        if changed:
            assert now[attempt.split] == (attempt.revision, attempt.sha256)
            assert attempt.revision == self._known.get(attempt.split, (-1, ""))[0] + 1
        self._known = now

    def _saw(self, commit: Commit) -> None:
        assert commit.revision == self._known.get(commit.split, (-1, ""))[0] + 1
        self._known[commit.split] = commit.revision, commit.sha256

    def _committed(self) -> dict[int, tuple[int, str]]:
        return {split: (commit.revision, commit.sha256) for split, commit in self._log.commits.items()}

    @invariant()
    def _check_parts(self) -> None:
        stood_for = {(commit.part, commit.sha256) for commit in read_commits(self._folder)}
        assert {(path.name, file_sha256(path)) for path in self._folder.parts.iterdir()} <= stood_for
        if any(self._folder.parts.iterdir()):
            rows = ds.dataset(self._folder.parts).to_table(columns=["row"])["row"].to_pylist()
            assert rows == sorted(set(rows))

    @invariant()
    def _nothing_committed_is_lost(self) -> None:
        assert self._committed() == self._known


def test_any_order_of_commits_deaths_and_restarts_leaves_each_split_committed_once(filesystem: Any) -> None:
    Commits.filesystem = filesystem
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Commits,
        settings=settings(
            max_examples=40,
            stateful_step_count=15,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
        ),
    )
