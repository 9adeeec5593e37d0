"""Indexes joined into one: each answers as before, and what does not belong together is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import JobError, UserError
from pipeline.index import merging
from pipeline.index.manifest import Provenance
from pipeline.index.merging import merge_indexes
from pipeline.index.search import VectorIndex
from pipeline.job_folder import JobFolder
from pipeline.lock import lock_existing
from tests.pipeline.index.indexed_job import KINDS, Make, assert_whole, found_in, unit


@pytest.mark.parametrize("kind", KINDS)
def test_merged_indexes_answer_as_each_did(job: Make, tmp_path: Path, kind: str) -> None:
    one = job("one", unit(60, seed=1), kind=kind, recall=0.1)
    two = job("two", unit(50, seed=2), kind=kind, recall=0.1, shards=2)
    one.delete(7)
    two.delete(9)
    merged = JobFolder(tmp_path / "merged")
    manifest = merge_indexes(merged, [one.folder, two.folder])
    assert [(entry.job, entry.path) for entry in manifest.jobs] == [("one", "../one"), ("two", "../two")]
    assert (manifest.num_vectors, manifest.num_deleted, len(manifest.shards)) == (110, 2, 3)
    (hits,) = VectorIndex.open(merged.index).search(unit(1, seed=3), 200, allowed=np.ones(110, np.bool_))
    every = [(hit.place.job, hit.place.row) for hit in hits]
    assert len(every) == 108
    assert not {("one", 7), ("two", 9)} & set(every)
    k = 1 if kind == "Flat" else 30
    assert all(("two", row) in hits for row, hits in enumerate(found_in(merged, two.vectors, k)) if row != 9)
    assert_whole(merged)


def test_a_merge_that_dies_at_any_step_leaves_no_index_or_the_whole(job: Make, tmp_path: Path, filesystem: Any) -> None:
    one, two = job("one", unit(20, seed=1)), job("two", unit(7, seed=2))
    one.delete(4)
    sources = [one.folder, two.folder]
    with filesystem.dies_at(None):
        merge_indexes(JobFolder(tmp_path / "merged"), sources)
    num_steps = len(filesystem.trace)
    assert num_steps > 5
    assert filesystem.trace[-3:] == ["rename", "open", "fsync"], "the name lasts"
    for step in range(num_steps):
        merged = JobFolder(tmp_path / f"merged-{step}")
        with filesystem.dies_at(step):
            merge_indexes(merged, sources)
        assert filesystem.died
        if not merged.index.exists():
            merge_indexes(merged, sources)  # what was left of it is in nobody's way
        assert_whole(merged)
        assert len(found_in(merged, unit(1, seed=3), 100)[0]) == 26
        assert not list(merged.attempts.iterdir())
    assert_whole(one.folder)


def test_what_another_process_or_a_file_holds_is_no_place_to_merge_into(job: Make, tmp_path: Path) -> None:
    one, two = job("one", unit(20, seed=1)), job("two", unit(7, seed=2))
    merged = JobFolder(tmp_path / "merged")
    merged.attempts.mkdir(parents=True)
    with lock_existing(merged):
        (merged.attempts / "index-of-another").mkdir()
        with pytest.raises(JobError, match="merged is in use by process"):
            merge_indexes(merged, [one.folder, two.folder])
        assert (merged.attempts / "index-of-another").is_dir()
    merge_indexes(merged, [one.folder, two.folder])
    assert sorted(path.name for path in merged.root.iterdir()) == [".lock", "_attempts", "index"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file; name a new folder"):
        merge_indexes(JobFolder(tmp_path / "file"), [one.folder, two.folder])


@pytest.mark.parametrize("change", ["delete", "compact"])
def test_a_source_that_changes_meanwhile_is_merged_as_it_is_then(
    job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    one, two = job("one", unit(20, seed=1)), job("two", unit(7, seed=2))
    one.delete(4)
    two.delete(4)
    renumbered, changes = merging._renumbered, [(lambda: one.delete(2)) if change == "delete" else two.compact]

    def changed_first(*arguments: Any) -> Any:
        if changes:
            changes.pop()()
        return renumbered(*arguments)

    monkeypatch.setattr(merging, "_renumbered", changed_first)
    merged = JobFolder(tmp_path / "merged")
    manifest = merge_indexes(merged, [one.folder, two.folder])
    assert (manifest.num_deleted, manifest.num_absent) == ((3, 0) if change == "delete" else (2, 1))
    assert len(found_in(merged, unit(1, seed=3), 100)[0]) == 27 - manifest.num_deleted
    assert_whole(merged)


def test_indexes_that_do_not_belong_together_are_not_merged(job: Make, tmp_path: Path, provenance: Provenance) -> None:
    one, two, other = (job(name, unit(20, seed=number)) for number, name in enumerate(("one", "two", "other")))
    out = JobFolder(tmp_path / "merged")
    one.add(two)
    with pytest.raises(UserError, match="two is in the index already, as 'two'"):
        merge_indexes(out, [one.folder, two.folder])
    other.build(provenance=dataclasses.replace(provenance, tokenizer="cc"))
    with pytest.raises(UserError, match=r"can't be merged with .*one: its vectors were made with another tokenizer"):
        merge_indexes(out, [one.folder, other.folder])
    other.build(kind="SQ8", recall=0.1)
    with pytest.raises(UserError, match=r"give both the same index\.kind"):
        merge_indexes(out, [one.folder, other.folder])
    other.build(center=True)
    with pytest.raises(UserError, match="centred on different means"):
        merge_indexes(out, [one.folder, other.folder])
    other.build()
    with pytest.raises(UserError, match="is not empty"):
        merge_indexes(two.folder, [one.folder, other.folder])
    assert not out.index.exists()
    other.build(recall=0.5)
    manifest = merge_indexes(out, [one.folder, other.folder])
    assert manifest.recall.target == 0.5, "what both have promised"
    assert_whole(out)
