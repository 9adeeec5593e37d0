"""An index served from actors on a real Ray: the same answers as in one process, and what dies is replaced."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.cli import execute
from jobs.client import connect
from jobs.index.served import ServedIndex, serving
from pipeline.errors import JobError, UserError
from pipeline.index.build import build_index
from pipeline.index.manifest import read_manifest
from pipeline.index.search import VectorIndex
from pipeline.indexed_jobs import latest_commits
from pipeline.job_folder import JobFolder
from tests.jobs.processes import actors_of, outliving
from workers.index_shard import IndexShardActor
from workers.serving.query_line import QueryLine
from workers.serving.query_messages import Message, respond
from workers.serving.query_wire import Door, Wire

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[3]
ENGINES = ROOT / "tests" / "workers"
CHEAP = "cheap_engine:load"
TEXTS = [f"text number {row}" for row in range(60)]  # as the job's are, but for 41, which is 17's


@dataclass(frozen=True)
class Served:
    out: Path
    about: dict[str, Any]
    client: ServedIndex


@pytest.fixture(scope="module")
def out(indexed_job: Path) -> Path:
    return indexed_job


@pytest.fixture(scope="module")
def served(out: Path, ray_cluster: str) -> Iterator[Served]:
    with serving(out, name="docs", engine_factory=CHEAP) as about, connect(out) as client:
        yield Served(out, about, client)


@pytest.fixture
def queries() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((20, 8)).astype(np.float32)


def rows_of(results: list[Any]) -> list[list[tuple[int, float]]]:
    return [[(hit.row, hit.score) for hit in result.hits] for result in results]


def test_it_says_what_it_serves(served: Served) -> None:
    assert {key: served.about[key] for key in ("name", "output", "vectors", "shards", "kind")} == {
        "name": "docs",
        "output": str(served.out),
        "vectors": 60,
        "shards": 3,
        "kind": "Flat",
    }


def test_three_shards_answer_as_one_index_in_this_process(served: Served, queries: np.ndarray, tmp_path: Path) -> None:
    whole = shutil.copytree(served.out, tmp_path / "whole")
    folder, made = JobFolder(whole), read_manifest(whole / "index")
    build_index(folder, latest_commits(folder), job="job", provenance=made.provenance, kind="Flat", shards=1)
    queries = np.concatenate([queries, VectorIndex.open(whole / "index").shards[0]._matrix[17:18]])  # the tie
    expected = VectorIndex.open(whole / "index").search(queries, 7)
    assert rows_of(served.client.search_vectors(queries, 7)) == [
        [(hit.place.row, hit.score) for hit in hits] for hits in expected
    ]
    assert [hit.place.row for hit in expected[-1][:2]] == [17, 41]
    assert [
        list(zip(numbers.tolist(), scores.tolist(), strict=True))
        for scores, numbers in served.client.nearest(queries, 7)
    ] == [[(hit.vector, hit.score) for hit in hits] for hits in expected]


def test_many_queries_go_in_messages_of_a_bounded_size_and_come_back_in_order(
    served: Served, queries: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = rows_of(served.client.search_vectors(queries, 3)), served.client.nearest(queries, 3)
    texts = rows_of(served.client.search(TEXTS[:17], 2))
    sent: list[int] = []
    send = QueryLine.send
    monkeypatch.setattr(QueryLine, "send", lambda line, request: sent.append(len(request)) or send(line, request))
    monkeypatch.setattr("workers.serving.index_client.QUERIES_A_MESSAGE", 8)
    assert rows_of(served.client.search_vectors(queries, 3)) == whole[0]
    assert str(served.client.nearest(queries, 3)) == str(whole[1])
    assert rows_of(served.client.search(TEXTS[:17], 2)) == texts
    assert len(sent) == 9
    assert served.client.search_vectors(queries[:0], 3) == []
    with pytest.raises(UserError, match="has shape 0 x 3"):
        served.client.search_vectors(queries[:0, :3], 3)


def test_a_filter_reaches_every_shard(served: Served, queries: np.ndarray) -> None:
    for _ in range(2):  # the second time the mask is known
        found = rows_of(served.client.search_vectors(queries, 100, filter="row in (3, 30, 50) or id == 'key-7'"))
        assert all({row for row, _ in hits} == {3, 7, 30, 50} for hits in found)
    with pytest.raises(UserError, match="no column 'rows'"):
        served.client.search(["text number 7"], filter="rows == 3")


def test_a_text_is_embedded_by_the_served_model(served: Served) -> None:
    (result,) = served.client.search(["text number 7"], k=3)
    best = result.hits[0]
    assert (result.query, best.row, best.id, best.text, best.field) == (
        "text number 7",
        7,
        "key-7",
        "text number 7",
        "prompt",
    )
    assert best.score == pytest.approx(1.0)
    assert best.columns == {"body": "text number 7"}
    assert len(result.hits) == 3


def test_no_texts_have_no_answers_and_what_is_asked_is_checked_all_the_same(served: Served) -> None:
    assert served.client.search([]) == []
    with pytest.raises(UserError, match="no column 'rows'"):
        served.client.search([], filter="rows == 3")
    for ask in (served.client.search, served.client.search_vectors, served.client.nearest):
        with pytest.raises(UserError, match=r"^query: k -1 is not in the range k >= 1$"):
            ask([], k=-1)


def test_one_text_that_fails_does_not_fail_those_asked_beside_it(served: Served) -> None:
    texts = [f"text number {row}" for row in range(40)] + ["REFUSE this"]

    def ask(text: str) -> int | str:
        try:
            return served.client.search([text], k=1)[0].hits[0].row
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(ask, texts))
    assert answers[:40] == list(range(40))
    assert answers[40] == "query 'REFUSE this': this request is refused"


def test_what_a_failed_batch_leaves_does_not_answer_the_texts_that_come_next(served: Served) -> None:
    with pytest.raises(JobError, match="this step breaks"):
        served.client.search(["BREAK this", "text number 7"], k=1)
    assert served.client.search(["text number 9"], k=1)[0].hits[0].row == 9


def test_the_command_asks_by_directory_or_by_name(
    served: Served, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps({"q": TEXTS[row], "n": row}) + "\n" for row in (3, 5)))
    for name in (str(served.out), "docs"):
        arguments = ["--address", served.about["address"], "-k", "1", "--json"]
        assert execute(["query", name, "--file", str(tmp_path / "queries.jsonl"), "--column", "q", *arguments]) == 0
        found = json.loads(capfd.readouterr().out)["results"]
        assert [(one["query"], one["hits"][0]["row"]) for one in found] == [(TEXTS[3], 3), (TEXTS[5], 5)]


def test_a_file_with_a_row_that_is_no_text_is_refused(
    served: Served, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pq.write_table(pa.table({"q": ["one", None]}), tmp_path / "queries.parquet")
    assert execute(["query", str(served.out), "--file", str(tmp_path / "queries.parquet")]) == 2
    assert "queries.parquet, row 1: column `q` is null" in capfd.readouterr().err


def test_what_is_not_served_is_named_beside_what_is(served: Served, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no index is served as 'other'; served are: docs"):
        connect("other")


def test_a_name_is_given_once(served: Served) -> None:
    with (
        pytest.raises(UserError, match="an index is served as 'docs' already"),
        serving(served.out, name="docs", engine_factory=CHEAP),
    ):
        pass
    assert served.client.search(["text number 7"], k=1)[0].hits[0].row == 7


def ask_while(served: Served, queries: np.ndarray, end: Callable[[], None]) -> tuple[list[Any], float]:
    """What a client hears that asks without a pause while `end` is called, and the longest that it waited."""
    timer = threading.Timer(0.2, end)
    timer.start()
    heard: list[Any] = []
    longest, begun = 0.0, time.monotonic()
    while timer.is_alive() or time.monotonic() - begun < 2.0:
        asked = time.monotonic()
        try:
            heard.append(rows_of(served.client.search_vectors(queries, 5)))
        except JobError as error:
            heard.append(error)
        longest = max(longest, time.monotonic() - asked)
    return heard, longest


def until_it_answers(ask: Callable[[], list[Any]]) -> list[Any]:
    deadline = time.monotonic() + 120
    while True:
        try:
            return ask()
        except JobError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


@pytest.mark.parametrize("kind", ["IndexShardActor", "EmbedderActor", "FrontActor"])
def test_an_actor_that_is_killed_is_replaced_and_queries_answer_or_fail_in_seconds(
    served: Served, queries: np.ndarray, kind: str
) -> None:
    before = rows_of(served.client.search_vectors(queries, 5))
    killed = actors_of(kind)[0]
    heard, longest = ask_while(served, queries, killed.kill)
    assert longest < 25.0  # 10 s for a replacement, by which Ray may have begun the other of two
    errors = [error for error in heard if isinstance(error, JobError)]
    assert all("\n" not in str(error) for error in errors)
    assert [answer for answer in heard if not isinstance(answer, JobError)].count(before) == len(heard) - len(errors)
    (result,) = until_it_answers(lambda: served.client.search(["text number 7"], k=1))
    assert result.hits[0].row == 7
    assert rows_of(served.client.search_vectors(queries, 5)) == before
    assert actors_of(kind)[0].pid != killed.pid or kind == "IndexShardActor"


def test_a_shard_that_is_stopped_is_replaced_too(served: Served, queries: np.ndarray) -> None:
    before = rows_of(served.client.search_vectors(queries, 5))
    stopped = actors_of("IndexShardActor")[0]
    heard, longest = ask_while(served, queries, stopped.suspend)
    assert longest < 40.0
    assert heard[-1] == before or isinstance(heard[-1], JobError)
    assert outliving([stopped]) == []
    assert until_it_answers(lambda: rows_of(served.client.search_vectors(queries, 5))) == before


def test_where_a_port_is_not_reached_all_who_ask_at_first_are_answered_through_ray_after_one_warning(
    ray_cluster: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import ray

    class Behind:
        def door(self) -> Door:
            return Door("192.0.2.1", 1, b"key")

        def ping(self) -> tuple[str, str]:
            return "ready", ""

        def answer(self, request: bytes) -> bytes:
            return respond({"double": lambda message: Message(message.values["n"] * 2)}, request)

    def give_up(door: Door) -> Wire:
        time.sleep(0.2)
        raise TimeoutError("timed out")

    monkeypatch.setattr(Wire, "to", give_up)
    actor: Any = ray.remote(num_cpus=0, max_concurrency=4, concurrency_groups={"health": 1})(Behind)
    line = QueryLine(actor.remote(), "the actor")
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda n: line.ask(Message({"ask": "double", "n": n})).values, range(8)))
    assert answers == [2 * n for n in range(8)]
    assert line.carrier == "ray"
    assert [said for said in (record.getMessage() for record in caplog.records) if "can't be reached" in said] == [
        "the actor can't be reached at 192.0.2.1:1 (timed out): asking through Ray, which takes longer"
    ]
    ray.kill(line.actor)


def test_a_model_that_changed_is_refused_with_what_changed(out: Path, tmp_path: Path) -> None:
    weights = out.parent / "model" / "model.safetensors"
    weights.write_bytes(b"other weights")
    try:
        with (
            pytest.raises(UserError, match=r"changed since the index was made \(model_files \(model.safetensors\)\)"),
            serving(out, name="changed", engine_factory=CHEAP),
        ):
            pass
    finally:
        weights.write_bytes(b"weights")


def test_a_damaged_shard_is_not_served(out: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(out / "index", tmp_path / "index")
    path = damaged / "shard-001.faiss"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    shard = IndexShardActor(str(damaged), read_manifest(damaged), 1, neighbours=1)
    with pytest.raises(JobError, match=r"shard-001.faiss is damaged"):
        shard.search("", np.ones((1, 8), np.float32), 1)
    assert shard.ping()[0] == "failed"


def ask_until_it_says(words: str, client: ServedIndex) -> bool:
    """Within half a minute; a query that is under way may be told first that the model is gone."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            client.search(["text number 7"], k=1)
        except JobError as error:
            if words in str(error):
                return True
    return False


def actors_named(name: str) -> list[str]:
    """Those whose names hold `name`, when they have had half a minute to end."""
    import ray

    deadline = time.monotonic() + 30
    while True:
        names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True) if name in actor["name"]]
        if not names or time.monotonic() > deadline:
            return names
        time.sleep(0.1)


def test_nothing_stays_behind_of_a_server_that_is_killed(out: Path, ray_cluster: str) -> None:
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from jobs.index.served import serving\n"
        f"with serving(Path({str(out)!r}), name='doomed', engine_factory={CHEAP!r}) as about:\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(600)\n"
    )
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ENGINES)]),
        "RAY_ADDRESS": ray_cluster,
    }
    server = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        with connect("doomed") as client:
            assert client.search(["text number 7"], k=1)[0].hits[0].row == 7
            server.send_signal(signal.SIGKILL)
            server.wait()
            assert ask_until_it_says("'doomed' is gone", client)
    finally:
        server.kill()
        server.communicate()
    assert actors_named("doomed") == []
