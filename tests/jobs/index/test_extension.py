"""Files that come into a job's input later become rows of its index by one command, whatever cuts it off."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import jobs.index.extension
from jobs.cli import execute
from jobs.index.extension import Extended, extend_index
from jobs.index.index_commands import add_to_index, delete_from_index, index_contents
from pipeline.audit import audit
from pipeline.errors import JobError, UserError
from pipeline.index.manifest import read_manifest
from pipeline.index.search import VectorIndex
from pipeline.indexed_jobs import IndexedRows

pytestmark = pytest.mark.ray

CHEAP = "cheap_engine:load"


class Died(BaseException):
    """Stands for SIGKILL: no handler for errors sees it."""


def drop(folder: Path, name: str, rows: int) -> None:
    folder.mkdir(exist_ok=True)
    texts = [f"{name} text {row}" for row in range(rows)]
    pq.write_table(pa.table({"body": texts, "day": [name] * rows}), folder / f"{name}.parquet")


@pytest.fixture
def settings(tmp_path: Path, cheap_model: Callable[..., Path]) -> dict[str, Any]:
    """A job over corpus/*.parquet, of which there is one."""
    drop(tmp_path / "corpus", "first", 12)
    return {
        "name": "docs",
        "model": str(cheap_model()),
        "input": {"path": str(tmp_path / "corpus" / "*.parquet")},
        "prompt": {"column": "body"},
        "embed": {"pooling": "mean", "center": True},
        "index": {"kind": "Flat"},
        "output": {"path": str(tmp_path / "out"), "columns": ["body", "day"], "rows_per_split": 8},
        "cluster": {"threads": 1},
    }


@pytest.fixture
def out(settings: dict[str, Any], run_job: Callable[..., Any], tmp_path: Path) -> Path:
    return run_job(settings).out


def extend(out: Path, **options: Any) -> list[Extended]:
    return extend_index(out, engine_factory=CHEAP, **options)


def texts_found(out: Path) -> list[tuple[str, str]]:
    """(job, text) of every vector that the index finds."""
    index = VectorIndex.open(out / "index")
    (hits,) = index.search(np.ones(index.manifest.dimension), 1000)
    records = IndexedRows(out, index.manifest).read([hit.place for hit in hits])
    return sorted((hit.place.job, records[hit.place.record].columns["body"]) for hit in hits)


def assert_whole(out: Path) -> None:
    found = audit(out)
    assert (found.problems, found.pending) == ((), ())


def test_new_files_become_rows_and_nothing_new_is_said(
    out: Path, settings: dict[str, Any], run_job: Callable[..., Any], tmp_path: Path, capfd: Any
) -> None:
    parts = {path: path.stat().st_mtime_ns for path in (out / "parts").iterdir()}
    shard = (out / "index" / "shard-000.faiss").read_bytes()
    assert extend(out) == []
    assert read_manifest(out / "index").version == 1
    drop(tmp_path / "corpus", "another", 5)  # before the first by name: rows keep their numbers all the same
    drop(tmp_path / "corpus", "later", 3)
    with pytest.raises(JobError, match=r"another.parquet has been added .*; `gristmill index extend .*out` adds its"):
        run_job(settings)

    (done,) = extend(out)
    assert (done.job, done.path, done.rows, done.vectors) == ("docs-2", "extensions/000001", 8, 8)
    assert [Path(file).name for file in done.files] == ["another.parquet", "later.parquet"]
    assert (out / "index" / "shard-000.faiss").read_bytes() == shard
    assert parts == {path: path.stat().st_mtime_ns for path in (out / "parts").iterdir()}
    assert not (out / "extensions" / "000001" / "index").exists(), "there is one index"
    expected = [("docs", f"first text {row}") for row in range(12)]
    expected += [("docs-2", f"another text {row}") for row in range(5)] + [
        ("docs-2", f"later text {row}") for row in range(3)
    ]
    assert texts_found(out) == sorted(expected)
    assert_whole(out)

    manifest = (out / "index" / "index.json").read_bytes()
    capfd.readouterr()
    assert execute(["index", "extend", str(out), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["extended"] == []
    assert execute(["index", "extend", str(out)]) == 0
    assert "nothing new" in capfd.readouterr().out
    assert (out / "index" / "index.json").read_bytes() == manifest
    run_job(settings)  # the job is done as before, and knows whose the other files are
    assert (out / "index" / "index.json").read_bytes() == manifest

    drop(tmp_path / "corpus", "third", 2)
    (done,) = extend(out)
    assert (done.job, done.path, done.rows) == ("docs-3", "extensions/000002", 2)
    run_job(settings | {"index": {"kind": "SQ8", "recall": 0.1}})
    assert texts_found(out) == sorted([*expected, ("docs-3", "third text 0"), ("docs-3", "third text 1")])
    # Moved as a whole, it stays whole.
    shutil.move(out, tmp_path / "moved")
    assert len(texts_found(tmp_path / "moved")) == 22
    assert_whole(tmp_path / "moved")
    assert extend(tmp_path / "moved") == []


def test_extensions_may_be_on_another_disk(out: Path, tmp_path: Path) -> None:
    drop(tmp_path / "corpus", "second", 3)
    extend(out)
    (out / "extensions").rename(tmp_path / "disk")
    (out / "extensions").symlink_to(tmp_path / "disk")
    assert extend(out) == []
    drop(tmp_path / "corpus", "third", 2)
    (done,) = extend(out)
    assert (done.path, done.vectors) == ("extensions/000002", 2)
    assert_whole(out)
    assert extend(out) == []
    assert len(texts_found(out)) == 17


def test_cut_off_anywhere_it_goes_on(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drop(tmp_path / "corpus", "second", 100)
    run = jobs.index.extension.run

    def died(*_: Any, **__: Any) -> Any:
        raise Died

    def died_in_the_job(*arguments: Any, **options: Any) -> Any:
        run(*arguments, **options, limit=64)
        raise Died

    with monkeypatch.context() as patch:  # before the job was planned
        patch.setattr(jobs.index.extension, "run", died)
        with pytest.raises(Died):
            extend(out)
    assert extend_of_nothing_begun(out)
    with monkeypatch.context() as patch:
        patch.setattr(jobs.index.extension, "run", died_in_the_job)
        with pytest.raises(Died):
            extend(out)
    assert index_contents(out)["vectors"] == 12
    assert any("are still to be run and added: gristmill index extend" in line for line in audit(out).pending)
    drop(tmp_path / "corpus", "third", 3)  # comes after what was begun
    first = out / "extensions" / "000001" / "parts" / "part-000000.parquet"
    stamp = first.stat().st_mtime_ns
    with monkeypatch.context() as patch:  # between the job and adding it
        patch.setattr(jobs.index.extension, "add_to_index", died)
        with pytest.raises(Died):
            extend(out)
    assert index_contents(out)["vectors"] == 12
    assert first.stat().st_mtime_ns == stamp, "what was committed is not run again"
    with pytest.raises(UserError, match=r"an extension was begun in .*000001; go on with it first"):
        extend(out, output=tmp_path / "elsewhere")
    done = extend(out)
    assert [(one.job, one.rows) for one in done] == [("docs-2", 100), ("docs-3", 3)]
    assert index_contents(out)["vectors"] == 115
    assert len(set(texts_found(out))) == 115
    assert extend(out) == []
    assert_whole(out)


def extend_of_nothing_begun(out: Path) -> bool:
    return (out / "extensions.json").exists() and not (out / "extensions").exists()


def test_known_files_that_are_others_or_gone_are_refused(out: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    drop(corpus, "second", 5)
    extend(out)
    drop(corpus, "third", 2)
    for name in ("first", "second"):
        path = corpus / f"{name}.parquet"
        content = path.read_bytes()
        path.write_bytes(content[:30] + bytes([content[30] ^ 1]) + content[31:])
        with pytest.raises(JobError, match=rf"{name}\.parquet has changed since the job was planned"):
            extend(out)
        path.unlink()
        with pytest.raises(JobError, match=rf"{name}\.parquet.*(is gone|no such file)"):
            extend(out)
        path.write_bytes(content)
    assert index_contents(out)["vectors"] == 17
    assert len(extend(out)) == 1


def test_a_file_whose_rows_were_deleted_may_be_gone_and_is_new_where_it_changed(out: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    drop(corpus, "second", 5)
    extend(out)
    drop(corpus, "first", 3)
    mend = r'delete .*out --filter "job == .docs. and 0 <= row < 12"'
    with pytest.raises(JobError, match=rf"first\.parquet has changed .*; put it back, or .*{mend}$"):
        extend(out)
    delete_from_index(out, filter="job == 'docs' and 0 <= row < 11")
    with pytest.raises(JobError, match="has changed"):
        extend(out)
    delete_from_index(out, filter="job == 'docs'")
    (done,) = extend(out)
    assert [Path(file).name for file in done.files] == ["first.parquet"]
    assert texts_found(out) == [("docs-2", f"second text {row}") for row in range(5)] + [
        ("docs-3", f"first text {row}") for row in range(3)
    ]
    (corpus / "second.parquet").unlink()
    with pytest.raises(JobError, match=r"second\.parquet is gone .* and 0 <= row < 5"):
        extend(out)
    delete_from_index(out, filter="job == 'docs-2'")
    assert extend(out) == []
    shutil.rmtree(out / "extensions" / "000001")
    drop(corpus, "third", 2)
    assert [one.job for one in extend(out)] == ["docs-4"]
    drop(corpus, "second", 5)
    assert extend(out) == [], "its rows were deleted, and their job's directory too"
    assert len(texts_found(out)) == 5
    # A job that was deleted and added anew counts by the rows that stand.
    delete_from_index(out, filter="job == 'docs-4'")
    add_to_index(out, out / "extensions" / "000003")
    drop(corpus, "third", 4)
    with pytest.raises(JobError, match=r"third\.parquet has changed .* \"job == 'docs-4-2' and 0 <= row < 2\"$"):
        extend(out)
    assert len(texts_found(out)) == 5


def test_rows_that_somebody_added_or_deleted_are_known(
    out: Path, settings: dict[str, Any], run_job: Callable[..., Any], tmp_path: Path
) -> None:
    drop(tmp_path / "corpus", "second", 5)
    own = {"name": "own", "input": {"path": str(tmp_path / "corpus" / "second.parquet")}}
    run_job(settings | own | {"output": {"path": str(tmp_path / "own"), "columns": ["body"]}})
    add_to_index(out, tmp_path / "own")
    assert extend(out) == []
    drop(tmp_path / "corpus", "third", 2)
    (done,) = extend(out, output=tmp_path / "third")
    assert (done.path, done.rows) == ("../third", 2)
    delete_from_index(out, filter=f"job == '{done.job}'")
    assert extend(out) == [], "they were deleted on purpose"
    run_job(settings)
    assert index_contents(out)["vectors"] == 19
    # Removed with the version before and built again, the index gets back what extended it.
    shutil.rmtree(out / "index")
    shutil.rmtree(out / "index-versions")
    (tmp_path / "corpus" / "second.parquet").unlink()  # which only the index knew
    run_job(settings)
    assert index_contents(out)["vectors"] == 12
    assert [one.job for one in extend(out)] == [done.job]


def test_what_can_not_be_extended_is_one_line(
    out: Path, settings: dict[str, Any], run_job: Callable[..., Any], tmp_path: Path, capfd: Any
) -> None:
    def refused(*arguments: str) -> str:
        capfd.readouterr()
        assert execute(["index", "extend", *arguments, "--json"]) in (1, 2)
        return str(json.loads(capfd.readouterr().out)["error"])

    drop(tmp_path / "corpus", "second", 5)
    assert "no such job directory" in refused("nowhere")
    assert "--set embed.pooling=last" in refused(str(out), "--set", "embed.pooling=last")
    assert "inside the input" in refused(str(out), "--output", str(tmp_path / "corpus" / "more.parquet"))
    assert "--memory lots" in refused(str(out), "--memory", "lots")
    (Path(settings["model"]) / "model.safetensors").write_bytes(b"others")
    assert "changed since the index was made" in refused(str(out))
    assert not (out / "extensions").exists()
