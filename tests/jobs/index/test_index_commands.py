"""An index after its job, by the command: two jobs run, one added to the other, rows deleted, indexes merged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.cli import execute
from jobs.index.bulk_query import bulk_query, neighbours
from jobs.index.query import embedding_spec
from pipeline.index.manifest import read_manifest
from pipeline.job_folder import JobFolder
from pipeline.lock import lock

pytestmark = pytest.mark.ray


@pytest.fixture
def jobs_done(tmp_path: Path, cheap_model: Callable[..., Path], run_job: Callable[..., Any]) -> dict[str, Any]:
    """out/first over the files of one day, and out/second over those of the next; name -> the job's settings."""
    model, settings = cheap_model(), {}
    for name, rows in (("first", 12), ("second", 5)):
        path = tmp_path / f"{name}.parquet"
        texts = [f"{name} text {row}" for row in range(rows)]
        pq.write_table(pa.table({"body": texts, "day": [name] * rows, "size": list(range(rows))}), path)
        settings[name] = {
            "name": name,
            "model": str(model),
            "input": {"path": str(path)},
            "prompt": {"column": "body"},
            "embed": {"pooling": "mean"},
            "index": {"kind": "Flat"},
            "output": {"path": str(tmp_path / name), "columns": ["body", "day", "size"], "rows_per_split": 8},
            "cluster": {"threads": 1},
        }
        run_job(settings[name])
    return settings


@pytest.fixture
def answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, Any]]:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, Any]:
        capfd.readouterr()
        status = execute([*arguments, "--json"])
        return status, json.loads(capfd.readouterr().out)

    return run


def vector_of(out: Path, row: int) -> np.ndarray:
    table = pq.read_table(out / "parts", columns=["row", "embedding"]).to_pylist()
    return np.array(next(record["embedding"] for record in table if record["row"] == row), np.float32)


def test_an_index_grows_forgets_and_is_merged(
    jobs_done: dict[str, Any],
    answer: Callable[..., tuple[int, Any]],
    run_job: Callable[..., Any],
    tmp_path: Path,
) -> None:
    np.save(tmp_path / "wanted.npy", vector_of(tmp_path / "second", 3))

    def hits(out: str, *options: str) -> list[tuple[str, int]]:
        status, document = answer("query", out, "--vector", "wanted.npy", "-k", "50", *options)
        assert status == 0, document
        (result,) = document["results"]
        return [(hit["job"], hit["row"]) for hit in result["hits"]]

    assert len(hits("first")) == 12
    assert answer("index", "merge", "both", "first", "second")[1]["vectors"] == 17
    assert answer("verify", "both")[0] == 0
    assert "whose jobs `gristmill index show both` names" in answer("index", "extend", "both")[1]["error"]
    assert hits("both")[0] == ("second", 3)

    status, shown = answer("index", "add", "first", "second")
    assert status == 0
    assert shown["jobs"] == [
        {"job": "first", "path": ".", "vectors": 12, "deleted": 0},
        {"job": "second", "path": "../second", "vectors": 5, "deleted": 0},
    ]
    assert hits("first")[0] == ("second", 3)
    _, document = answer("query", "first", "--vector", "wanted.npy", "-k", "1")
    assert document["results"][0]["hits"][0]["columns"] == {"body": "second text 3", "day": "second", "size": 3}
    assert sorted(hits("first", "--filter", "size < 2 or day == 'second' and size == 4")) == [
        ("first", 0),
        ("first", 1),
        ("second", 0),
        ("second", 1),
        ("second", 4),
    ]
    assert answer("index", "add", "first", "second")[0] == 2

    # Many queries at once say of which job their neighbours are, also of an index that has no job of its own.
    asked = {("first", 5): "first text 5", ("second", 3): "second text 3", ("second", 0): "second text 0"}
    pq.write_table(pa.table({"q": list(asked.values())}), tmp_path / "queries.parquet")
    found = tmp_path / "found"
    bulk_query(tmp_path / "both", str(tmp_path / "queries.parquet"), found, k=2, engine_factory="cheap_engine:load")
    best = [record for record in neighbours(found).to_table().to_pylist() if record["rank"] == 1]
    assert [(record["job"], record["row"], record["id"]) for record in best] == [(*at, str(at[1])) for at in asked]
    assert answer("verify", "found")[1]["neighbours"] == 6

    status, shown = answer("index", "delete", "first", "--filter", "day == 'second' and size == 3")
    assert (status, shown["num_deleted"], shown["version"]) == (0, 1, 3)
    assert ("second", 3) not in hits("first")
    (tmp_path / "ids").write_text("7\n8\n")
    status, refused = answer("index", "delete", "first", "--ids", "ids")
    assert (status, "say whose are meant by --job: first, second" in refused["error"]) == (2, True)
    assert answer("index", "delete", "first", "--ids", "ids", "--job", "first")[1]["num_deleted"] == 2
    assert answer("index", "delete", "first", "--id", "7", "--job", "first")[1]["num_deleted"] == 0
    assert len(hits("first")) == 14
    assert answer("status", "first")[1]["index"]["current"]
    status, found = answer("verify", "first")
    assert (status, found["indexed_vectors"], found["deleted_vectors"]) == (0, 17, 3)

    status, shown = answer("index", "compact", "first")
    assert (status, shown["compacted"]["vectors"], shown["deleted"], shown["deleted_held"]) == (0, 3, 3, 0)
    assert len(hits("first")) == 14
    assert answer("index", "compact", "first")[1]["version"] == shown["version"], "there is nothing to compact"
    assert answer("verify", "first")[0] == 0

    manifest = (tmp_path / "first" / "index" / "index.json").read_bytes()
    run_job(jobs_done["first"])
    assert (tmp_path / "first" / "index" / "index.json").read_bytes() == manifest, "a job that is done does nothing"
    run_job(jobs_done["first"] | {"index": {"kind": "SQ8", "recall": 0.1}})
    _, shown = answer("index", "show", "first")
    assert (shown["kind"], shown["vectors"], shown["deleted"]) == ("SQ8", 17, 3)
    assert len(hits("first", "--filter", "size >= 0")) == 14
    assert answer("verify", "first")[0] == 0
    history = answer("index", "versions", "first")[1]["versions"]
    assert [(note["version"], note["change"], note["num_vectors"], note["num_deleted"]) for note in history] == [
        (1, "built", 12, 0),
        (2, "added second: 5 vectors", 17, 0),
        (3, "deleted 1 vector", 17, 1),
        (4, "deleted 2 vectors", 17, 3),
        (5, "compacted: 3 deleted vectors taken out", 17, 3),
        (6, "built again, as SQ8", 17, 3),
    ]
    assert [note["kept"] for note in history] == [False, False, False, False, True, True]
    assert (shown["change"], shown["changed_at"]) == (history[-1]["change"], history[-1]["at"])
    assert (
        shown["bytes"]
        == sum(path.stat().st_size for path in (tmp_path / "first" / "index").iterdir())
        - (tmp_path / "first" / "index" / "index.json").stat().st_size
    )

    # Of a job whose rows are all deleted nothing is needed any more.
    assert answer("index", "delete", "both", "--filter", "job == 'first'")[1]["num_deleted"] == 12
    (tmp_path / "first").rename(tmp_path / "away")
    assert embedding_spec(tmp_path / "both", read_manifest(tmp_path / "both" / "index")).name == "second"
    assert len(hits("both", "--filter", "size >= 0")) == 5
    assert answer("index", "compact", "both")[0] == 0
    assert answer("verify", "both")[0] == 0
    assert len(hits("both")) == 5

    # As a crash leaves it where two names can't be exchanged in one step.
    (tmp_path / "both" / "index").rename(tmp_path / "both" / "index-versions" / "replaced")
    assert "puts it back" in answer("verify", "both")[1]["pending"][0]
    assert len(hits("both")) == 5
    assert answer("verify", "both")[0] == 0


def test_what_can_not_be_is_one_line(
    jobs_done: dict[str, Any], answer: Callable[..., tuple[int, Any]], tmp_path: Path
) -> None:
    for arguments, expected in (
        (("index", "add", "first", "nowhere"), "no such job directory"),
        (("index", "add", "nowhere", "first"), "no such job directory"),
        (("index", "delete", "first"), "give one of --filter, --id and --ids"),
        (("index", "delete", "first", "--filter", "sizes == 3"), "did you mean 'size'?"),
        (("index", "delete", "first", "--ids", "nowhere"), "can't be read"),
        (("index", "delete", "first", "--id", "7", "--job", "firts"), "did you mean 'first'?"),
        (("index", "merge", "both", "first"), "at least two"),
        (("index", "merge", "second", "first", "second"), "is not empty"),
        (("index", "merge", "both", "first", "first"), "is in the index already"),
    ):
        status, document = answer(*arguments)
        assert status == 2, document
        assert expected in document["error"]
    with lock(JobFolder(tmp_path / "first")):
        for command in (("add", "first", "second"), ("compact", "first"), ("extend", "first")):
            status, document = answer("index", *command)
            assert (status, "is in use by process" in document["error"]) == (1, True)
    (tmp_path / "second" / "commits" / "000000.json").unlink()
    status, document = answer("index", "add", "first", "second")
    assert (status, "is not done yet" in document["error"]) == (2, True)
