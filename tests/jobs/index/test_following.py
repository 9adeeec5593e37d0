"""A served index takes up what becomes of its directory, and each query is answered by one version alone."""

from __future__ import annotations

import dataclasses
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs.client import connect
from jobs.index.index_commands import compact_index, delete_from_index
from jobs.index.served import ServedIndex, serving
from pipeline.durable import replace_file, seal
from pipeline.errors import JobError
from pipeline.index.build import build_index
from pipeline.index.manifest import MANIFEST_NAME, read_manifest
from pipeline.indexed_jobs import latest_commits
from pipeline.job_folder import JobFolder
from tests.jobs.processes import actors_of
from workers.serving.query_wire import Wire

pytestmark = pytest.mark.ray

CHEAP = "cheap_engine:load"
PATIENCE_S = 120.0
DELETED = {3, 30, 50}  # one of each shard


@dataclasses.dataclass
class Following:
    folder: JobFolder
    client: ServedIndex
    heard: list[str]

    def await_version(self, version: int) -> None:
        self.wait(lambda: self.client.about["version"] == version)

    def wait(self, until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not until():
            assert time.monotonic() < deadline, self.heard
            time.sleep(0.05)


@pytest.fixture(scope="module")
def following(indexed_job: Path, ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Following]:
    """Of a copy that may be changed; its three shards are served."""
    out = shutil.copytree(indexed_job, tmp_path_factory.mktemp("following") / "out")
    heard: list[str] = []
    with (
        serving(out, name="growing", engine_factory=CHEAP, on_change=heard.append),
        connect("growing") as client,
    ):
        yield Following(JobFolder(out), client, heard)


def rows_found(client: ServedIndex) -> frozenset[int]:
    (result,) = client.search(["text number 7"], k=60)
    return frozenset(hit.row for hit in result.hits)


def rows_found_or_none(client: ServedIndex) -> frozenset[int] | None:
    """None where no answer came in time."""
    try:
        return rows_found(client)
    except JobError:
        return None


def shard_processes() -> set[int]:
    return {process.pid for process in actors_of("IndexShardActor")}


def test_rows_that_are_deleted_are_not_found_a_moment_later_and_no_query_sees_half_of_it(following: Following) -> None:
    before = shard_processes()
    answers: Counter[frozenset[int]] = Counter()
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set():
            answers[rows_found(following.client)] += 1

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        following.wait(lambda: bool(answers))
        delete_from_index(following.folder.root, ids=[f"key-{row}" for row in DELETED])
        following.await_version(2)
        seen = sum(answers.values())
        following.wait(lambda: sum(answers.values()) > seen + 1)
    finally:
        ended.set()
        asking.join()
    everything = frozenset(range(60))
    assert set(answers) == {everything, everything - DELETED}
    assert following.client.about["vectors"] == 57
    following.wait(lambda: bool(following.heard))  # which comes after the first answers
    assert following.heard == ["now serving version 2: 57 vectors"]
    assert shard_processes() == before, "what is in memory stays there"


def test_a_killed_front_and_a_killed_shard_come_back_with_the_version_that_was_served(following: Following) -> None:
    """They were started with the one before, of which the files may be gone."""
    delete_from_index(following.folder.root, ids=["key-8"])
    following.await_version(3)
    expected = frozenset(range(60)) - DELETED - {8}
    for kind in ("FrontActor", "IndexShardActor"):
        actors_of(kind)[0].kill()
        following.wait(lambda: rows_found_or_none(following.client) is not None)
        assert rows_found(following.client) == expected


def test_a_compacted_index_is_served_and_finds_what_it_found(following: Following) -> None:
    before, after = compact_index(following.folder.root)
    assert (before.num_absent, after.num_absent) == (0, 4)
    following.await_version(4)
    assert rows_found(following.client) == frozenset(range(60)) - DELETED - {8}


def test_an_index_that_is_built_anew_is_served_by_new_shards_and_the_old_ones_end(following: Following) -> None:
    old = shard_processes()
    made = read_manifest(following.folder.index)
    commits = latest_commits(following.folder)
    build_index(following.folder, commits, job=made.jobs[0].job, provenance=made.provenance, kind="Flat", shards=1)
    following.wait(lambda: following.client.about["shards"] == 1)
    assert rows_found(following.client) == frozenset(range(60))
    following.wait(lambda: not old & shard_processes())
    assert len(shard_processes()) == 1


def test_an_index_that_embeds_otherwise_is_not_taken_up_and_it_is_said_why(following: Following) -> None:
    made = read_manifest(following.folder.index)
    other = dataclasses.replace(made, provenance=dataclasses.replace(made.provenance, pooling="last"))
    path = following.folder.index / MANIFEST_NAME
    replace_file(path, seal(other.to_json()), drafts=following.folder.attempts)
    following.wait(lambda: any(words.startswith("still serving version ") for words in following.heard))
    assert "another pooling (last there, mean here): start serve-index again" in following.heard[-1]
    assert rows_found(following.client) == frozenset(range(60))


def test_where_its_port_can_not_be_reached_it_is_asked_through_ray_which_is_said(
    following: Following, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert following.client.about["asked_by"] == following.client.about["shards_asked_by"] == "socket"

    def refuse(door: object) -> Wire:
        raise ConnectionRefusedError("nobody listens there")

    monkeypatch.setattr(Wire, "to", refuse)
    with connect("growing") as far:
        assert rows_found(far) == frozenset(range(60))
        assert (far.about["asked_by"], far.about["shards_asked_by"]) == ("ray", "socket")
    assert "asking through Ray, which takes longer" in caplog.text
