"""A bulk search up to where workers are started: what it holds its folder to, and which index it asks."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import jobs.index.bulk_query
import workers.index_shard
from jobs.index.bulk_query import bulk_query
from jobs.index.index_commands import add_to_index
from pipeline.durable import read_sealed
from pipeline.errors import UserError
from pipeline.index.merging import merge_indexes
from pipeline.job_folder import JobFolder, write_job, write_plan
from pipeline.neighbours import QUERIES_NAME, SCHEMA, SEARCH_NAME
from pipeline.source import Source


class WorkersAreStartedError(Exception):
    pass


def refuse(*arguments: Any, **options: Any) -> Any:
    raise WorkersAreStartedError


@pytest.fixture
def queries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of two columns; a search for its rows ends where it would start workers."""

    monkeypatch.setattr(jobs.index.bulk_query, "ray_session", refuse)
    path = tmp_path / "queries.parquet"
    pq.write_table(pa.table({"one": ["a"], "other": ["b"]}), path)
    return path


def begin(found: Path, queries: Path) -> None:
    """As a search is once the job of its queries was planned."""
    folder, source = JobFolder(found / QUERIES_NAME), Source.open(str(queries))
    folder.create()
    splits = [{"index": 0, "first_row": 0, "num_rows": source.num_rows}]
    write_plan(folder, fingerprint="of queries", splits=splits, document={"source": source.to_json()})
    write_job(folder, fingerprint="of queries", document={})


@pytest.mark.parametrize("template", ["{{ text }}", "What is {{ text }}?"])
def test_another_column_is_another_search_once_one_has_begun(
    made_index: Callable[..., JobFolder], queries: Path, tmp_path: Path, template: str
) -> None:
    out, found = made_index(["a", "b"], query_template=template).root, tmp_path / "found"
    for column in ("other", "one", "one"):
        with pytest.raises(WorkersAreStartedError):
            bulk_query(out, str(queries), found, column=column)
    begin(found, queries)
    with pytest.raises(UserError, match=r"--output .*/found holds another search, with another (embed|prompt);"):
        bulk_query(out, str(queries), found, column="other")


def test_a_file_is_the_same_by_all_its_names_and_no_other_of_the_same_name(
    made_index: Callable[..., JobFolder], queries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, found = made_index(["a", "b"]).root, tmp_path / "found"

    def ask(source: str) -> None:
        bulk_query(out, source, found, column="one")

    monkeypatch.chdir(tmp_path)
    with pytest.raises(WorkersAreStartedError):
        ask("queries.parquet")
    begin(found, queries)
    monkeypatch.chdir(out)
    for name in (str(queries), "../queries.parquet", "./../out/../queries.parquet"):
        with pytest.raises(WorkersAreStartedError):
            ask(name)
    shutil.copy(queries, out)
    with pytest.raises(UserError, match=r"--output .*/found holds another search, with another input;"):
        ask("queries.parquet")


def test_a_search_that_was_refused_leaves_its_folder_to_the_next(
    made_index: Callable[..., JobFolder], queries: Path, tmp_path: Path
) -> None:
    out, found = made_index(["a", "b"]).root, tmp_path / "found"
    with pytest.raises(UserError, match="there is no column 'lang'"):
        bulk_query(out, str(queries), found, column="one", filter="lang == 'en'")
    with pytest.raises(WorkersAreStartedError):
        bulk_query(out, str(queries), found, column="one", filter="key == 'b'")
    assert read_sealed(found / SEARCH_NAME)["filter"] == "key == 'b'"


def test_an_index_without_a_job_keeps_its_folder(
    made_index: Callable[..., JobFolder], queries: Path, tmp_path: Path
) -> None:
    out, merged = made_index(["a", "b"]).root, JobFolder(tmp_path / "merged")
    merge_indexes(merged, [JobFolder(out), made_index(["c"], name="other")])
    before = sorted(merged.root.iterdir())
    with pytest.raises(UserError, match=r"--output .*/merged holds something else; name another folder"):
        bulk_query(out, str(queries), merged.root, column="one")
    assert sorted(merged.root.iterdir()) == before


def test_a_tilde_is_the_home_folder_from_the_begin_to_the_end(
    made_index: Callable[..., JobFolder], queries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))

    def search(embedded: Path, target: JobFolder, *arguments: Any) -> None:
        assert embedded == target.root / "queries" == tmp_path / "found" / "queries"
        pq.write_table(pa.Table.from_pylist([{"query_row": 0, "rank": 1}], SCHEMA), target.parts / "part.parquet")

    monkeypatch.setattr(jobs.index.bulk_query, "ray_session", lambda *_, **__: nullcontext())
    monkeypatch.setattr(jobs.index.bulk_query, "run", lambda spec, **_: SimpleNamespace(out=Path(spec.output.path)))
    monkeypatch.setattr(jobs.index.bulk_query, "_search_all", search)
    answer = bulk_query(made_index(["a"]).root, str(queries), Path("~/found"), column="one")
    assert (answer["output"], answer["neighbours"]) == (str(tmp_path / "found"), 1)


def test_an_index_that_changes_while_queries_are_embedded_is_searched_as_it_was(
    made_index: Callable[..., JobFolder], queries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = made_index(["a", "b"]).root

    def embed(spec: Any, **options: Any) -> Any:
        made_index(["c"], name="other")
        add_to_index(out, tmp_path / "other")
        return SimpleNamespace(out=Path(spec.output.path))

    monkeypatch.setattr(jobs.index.bulk_query, "ray_session", lambda *_, **__: nullcontext())
    monkeypatch.setattr(jobs.index.bulk_query, "run", embed)
    monkeypatch.setattr(workers.index_shard, "start_shards", refuse)
    with pytest.raises(WorkersAreStartedError):
        bulk_query(out, str(queries), tmp_path / "found", column="one")
