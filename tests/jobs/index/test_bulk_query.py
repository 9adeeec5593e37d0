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
from pipeline.audit import audit
from pipeline.durable import file_sha256, read_sealed, seal
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
    ask: Callable[..., Any],
    indexed_job: Path,
    queries: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
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
    whole = audit(tmp_path / "found")
    assert (whole.problems, whole.pending) == ((), ())
    assert (whole.rows, whole.errors, whole.neighbours, whole.splits) == (150, 2, 148 * 3, 3)
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
    assert_changes_are_seen(tmp_path / "found", capfd)


def test_killed_at_any_time_it_goes_on_and_repeats_nothing(
    ask: Callable[..., Any], ray_cluster: str, indexed_job: Path, queries: Path, tmp_path: Path
) -> None:
    few = "row < 2"
    script = (
        "from pathlib import Path\n"
        "import jobs.index.bulk_query as bulk, time\n"
        "written, naps = bulk.neighbour_table, iter((0, 600))\n"
        "def slowly(*arguments):\n"
        "    print('searching', flush=True)\n"
        "    time.sleep(next(naps))\n"
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
    assert any("2 of 3 splits" in line for line in audit(found).pending)
    parts = sorted((found / "parts").iterdir())
    assert [path.name for path in parts] == ["part-000000.parquet"]
    stamp = parts[0].stat().st_mtime_ns
    assert list((found / "_attempts").iterdir()) != [], "it was killed in the midst of the second"
    assert ask(filter=few)["neighbours"] == 148 * 2, "no more rows match"
    assert {record["row"] for record in records(found)} == {0, 1, None}
    assert asked_for(found) == list(range(150))
    assert parts[0].stat().st_mtime_ns == stamp
    assert list((found / "_attempts").iterdir()) == []


def assert_changes_are_seen(found: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """By `gristmill verify`, of a search that is whole."""
    capfd.readouterr()
    assert execute(["verify", str(found)]) == 0
    assert "is whole: 150 of 150 queries in 3 splits, 2 errors, 444 neighbours" in capfd.readouterr().out
    for name in (
        "search.json",
        "parts/part-000001.parquet",
        "commits/000002.json",
        "queries/parts/part-000000.parquet",
        "queries/plan.json",
    ):
        path = found / name
        content = path.read_bytes()
        path.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
        assert execute(["verify", str(found)]) == 1
        assert str(path) in capfd.readouterr().out
        path.write_bytes(content)
    # Changed together with its hash.
    path, commit = found / "parts" / "part-000000.parquet", found / "commits" / "000000.json"
    table = pq.read_table(path, partitioning=None)
    for changed, said in (
        (table.slice(1), "it holds 189 records, and its commit says 190"),
        (table.slice(3), "does not answer queries 0 to 63, each once and in order"),
        (pa.concat_tables([table.slice(0, 3), table]), "the neighbours of query 0 are not 3, best first"),
        (table.take([1, 0, *range(2, len(table))]), "the neighbours of query 0 are not 3, best first"),
        (table.drop_columns("job"), "its columns are"),
    ):
        pq.write_table(changed, path)
        document = read_sealed(commit) | {"sha256": file_sha256(path), "size_bytes": path.stat().st_size}
        commit.write_bytes(seal(document))
        assert any(said in problem for problem in audit(found).problems), (said, audit(found).problems)
    (found / "parts" / "part-000002.parquet").rename(found / "parts" / "part-000003.parquet")
    problems = audit(found).problems
    assert any("part-000003.parquet has no commit" in problem for problem in problems)
    assert any("part-000002.parquet is missing" in problem for problem in problems)


def test_the_command_says_what_it_needs(indexed_job: Path, queries: Path, tmp_path: Path, capfd: Any) -> None:
    assert execute(["query", str(indexed_job), "text", "--output", str(tmp_path / "found")]) == 2
    assert "--output" in capfd.readouterr().err
    assert execute(["query", str(indexed_job), "text", "--id", "name"]) == 2
    assert execute(["query", str(indexed_job), "--file", str(queries), "--output", str(tmp_path / "found")]) == 2
    assert "column" in capfd.readouterr().err, "the file has two columns of text"
