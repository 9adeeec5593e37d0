"""Many queries as a job on a real Ray: the same neighbours as one by one, whatever dies on the way."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import jobs.index.bulk_query
from jobs.cli import execute
from jobs.client import connect
from jobs.index.bulk_query import bulk_query, neighbours
from jobs.index.served import serving
from pipeline.errors import JobError, UserError

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[3]
ENGINES = ROOT / "tests" / "workers"
CHEAP = "cheap_engine:load"
# Of three splits, as `auto` makes them: some of the corpus's texts, two that fail, and others.
QUERIES = [f"text number {number % 70}" for number in range(150)]
QUERIES[5], QUERIES[70] = "", "NAN"


@pytest.fixture
def queries(tmp_path: Path) -> Path:
    path = tmp_path / "queries.parquet"
    pq.write_table(pa.table({"q": QUERIES, "name": [f"q{number}" for number in range(len(QUERIES))]}), path)
    return path


@pytest.fixture
def ask(indexed_job: Path, queries: Path, tmp_path: Path) -> Callable[..., Any]:
    def run(**options: Any) -> Any:
        given = {"k": 3, "column": "q", "id_column": "name", "engine_factory": CHEAP} | options
        return bulk_query(indexed_job, str(queries), tmp_path / "found", **given)

    return run


def records(folder: Path) -> list[dict[str, Any]]:
    return neighbours(folder).to_table().to_pylist()


def asked_for(folder: Path) -> list[int]:
    """The queries that have a first record, in order."""
    return [record["query_row"] for record in records(folder) if record["rank"] in (1, None)]


def test_neighbours_are_those_that_single_queries_find(
    ask: Callable[..., Any], indexed_job: Path, queries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ask() == {"output": str(tmp_path / "found"), "queries": 150, "errors": 2, "neighbours": 148 * 3}
    found = records(tmp_path / "found")
    with serving(indexed_job, name="single", engine_factory=CHEAP), connect("single") as index:
        good = [number for number in range(150) if number not in (5, 70)]
        results = index.search([QUERIES[number] for number in good], k=3)
    expected = [
        {
            "query_row": number,
            "query_id": f"q{number}",
            "rank": rank,
            "score": hit.score,
            "row": hit.row,
            "id": hit.id,
            "sample": 0,
            "field": "prompt",
        }
        for number, result in zip(good, results, strict=True)
        for rank, hit in enumerate(result.hits, 1)
    ]
    hits = [record for record in found if record["rank"] is not None]
    assert [{key: record[key] for key in expected[0]} for record in hits] == expected
    failed = {record["query_row"]: record for record in found if record["rank"] is None}
    assert {row: record["error_code"] for row, record in failed.items()} == {5: "empty_prompt", 70: "nonfinite"}
    assert failed[5]["query_id"] == "q5"
    assert asked_for(tmp_path / "found") == list(range(150))
    # Asked again, it does nothing; another search is refused.
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "found").rglob("*.parquet")}
    monkeypatch.setattr(jobs.index.bulk_query, "ray_session", lambda *_, **__: pytest.fail("workers are started"))
    assert ask()["neighbours"] == 148 * 3
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
    with pytest.raises(UserError, match=r"holds another search, with another k; name another folder"):
        ask(k=4)
    pq.write_table(pa.table({"q": ["another"], "name": ["q0"]}), queries)
    with pytest.raises(JobError, match=r"queries.parquet has changed"):
        ask()


def test_killed_at_any_time_it_goes_on_and_repeats_nothing(
    ask: Callable[..., Any], ray_cluster: str, indexed_job: Path, queries: Path, tmp_path: Path
) -> None:
    few = "row < 2"
    script = (
        "from pathlib import Path\n"
        "import jobs.index.bulk_query as bulk, time\n"
        "written = bulk.neighbour_table\n"
        "def slowly(*arguments):\n"
        "    print('searching', flush=True)\n"
        "    time.sleep(0.5)\n"
        "    return written(*arguments)\n"
        "bulk.neighbour_table = slowly\n"
        f"bulk.bulk_query(Path({str(indexed_job)!r}), {str(queries)!r}, Path({str(tmp_path / 'found')!r}), k=3,\n"
        f"    column='q', id_column='name', filter={few!r}, engine_factory={CHEAP!r})\n"
    )
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ENGINES)]),
        "RAY_ADDRESS": ray_cluster,
    }
    asked = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert asked.stdout is not None
        assert [asked.stdout.readline() for _ in range(2)] == ["searching\n"] * 2  # so the first split is committed
    finally:
        asked.kill()
        asked.communicate()
    found = tmp_path / "found"
    parts = sorted((found / "parts").iterdir())
    assert [path.name for path in parts] == ["part-000000.parquet"]
    stamp = parts[0].stat().st_mtime_ns
    assert list((found / "_attempts").iterdir()) != [], "it was killed in the midst of the second"
    assert ask(filter=few)["neighbours"] == 148 * 2, "no more rows match"
    assert {record["row"] for record in records(found)} == {0, 1, None}
    assert asked_for(found) == list(range(150))
    assert parts[0].stat().st_mtime_ns == stamp
    assert list((found / "_attempts").iterdir()) == []


def test_the_command_says_what_it_needs(indexed_job: Path, queries: Path, tmp_path: Path, capfd: Any) -> None:
    assert execute(["query", str(indexed_job), "text", "--output", str(tmp_path / "found")]) == 2
    assert "--output" in capfd.readouterr().err
    assert execute(["query", str(indexed_job), "text", "--id", "name"]) == 2
    assert execute(["query", str(indexed_job), "--file", str(queries), "--output", str(tmp_path / "found")]) == 2
    assert "column" in capfd.readouterr().err, "the file has two columns of text"
