"""Filters over carried columns of one job and of several, and the search among what they leave."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.commits import CommitLog
from pipeline.errors import JobError, RowError, UserError
from pipeline.index.build import build_index
from pipeline.index.check import IndexedParts, index_problems
from pipeline.index.compaction import compact
from pipeline.index.deletions import delete_vectors
from pipeline.index.expression import Filter
from pipeline.index.manifest import Provenance, read_manifest
from pipeline.index.matching import OfIds, matching_vectors
from pipeline.index.search import VectorIndex
from pipeline.index.versions import change_index
from pipeline.indexed_jobs import job_folder, latest_commits
from pipeline.job_folder import JobFolder, write_job, write_plan
from pipeline.parts import PartBuilder
from pipeline.records import RecordLayout

LANGS = ["en", "de", "en", None, "fr", "en", "de"]
YEARS = [2019, 2020, 2021, 2022, 2023, 2024, 2025]


@pytest.fixture
def job(tmp_path: Path, provenance: Provenance) -> JobFolder:
    """Seven rows in three parts, two samples a row; the prompt and each generation have a vector. Row 2 failed."""
    folder = JobFolder(tmp_path / "out")
    log = CommitLog(folder, fingerprint="this job")
    log.recover()
    carried = pa.record_batch({"lang": LANGS, "year": YEARS, "text": [f"text {row}" for row in range(7)]})
    layout = RecordLayout.of(samples=2, embeds="both", dimension=3, carried=carried.schema)
    splits = [{"index": n, "first_row": first, "num_rows": min(3, 7 - first)} for n, first in enumerate((0, 3, 6))]
    for split in splits:
        first, count = split["first_row"], split["num_rows"]
        builder = PartBuilder(layout, split=split["index"], first_row=first, num_rows=count)
        builder.carry(first, carried.slice(first, count))
        for row in range(first, first + count):
            if row == 2:
                builder.fail(row, RowError("internal", "no"))
                continue
            builder.add_vector(row, "prompt", np.array([1, row, 0], np.float32))
            for sample in range(2):
                text = f"answer {row}.{sample}"
                builder.add(row, sample=sample, text=text, finish_reason="stop", prompt_tokens=1, completion_tokens=1)
                builder.add_vector(row, "generation", np.array([1, row, 1 + sample], np.float32), sample=sample)
        log.publish(log.commit(builder.write(folder)))
    spec = {"output": {"columns": ["lang", "year", "text"]}, "generate": {"n": 2}}
    write_job(folder, fingerprint="this job", document={"spec": spec})
    write_plan(folder, fingerprint="this job", splits=splits, document={})
    build_index(folder, log.commits, job="mine", provenance=provenance, shards=2)
    return folder


@pytest.fixture
def found(job: JobFolder) -> Callable[[str], list[tuple[int, int, str]]]:
    """`found(filter)` -> (row, sample, field) of all vectors that it leaves to be found."""
    index = VectorIndex.open(job.index)

    def search(text: str) -> list[tuple[int, int, str]]:
        mask = matching_vectors(job.index, index.manifest, Filter.parse(text), lambda _: job)
        (hits,) = index.search(np.ones(3), 100, allowed=mask)
        assert len(hits) == mask.sum()
        return sorted((hit.place.row, hit.place.sample, hit.place.field) for hit in hits)

    return search


def vectors_of(*rows: int) -> list[tuple[int, int, str]]:
    return sorted(
        entry for row in rows for entry in [(row, 0, "prompt"), (row, 0, "generation"), (row, 1, "generation")]
    )


Found = Callable[[str], list[tuple[int, int, str]]]


def test_all_vectors_of_a_row_are_meant_across_parts(found: Found) -> None:
    assert found("lang == 'en'") == vectors_of(0, 5)  # row 2 failed
    assert found("lang in ('de', 'fr') and year > 2020") == vectors_of(4, 6)
    assert found("lang is None") == vectors_of(3)
    assert found("year > 3000") == []


def test_vectors_of_samples_and_prompts_stay_apart_when_an_index_is_compacted(job: JobFolder) -> None:
    gone = np.flatnonzero(
        matching_vectors(job.index, read_manifest(job.index), Filter.parse("sample == 1 or row == 4"), lambda _: job)
    )
    change_index(job, lambda draft, manifest: delete_vectors(draft, manifest, gone))
    parts = [IndexedParts(job, latest_commits(job))]
    manifest = change_index(job, lambda draft, before: compact(draft, before, parts))
    assert manifest.num_absent == len(gone) == 8
    left = [(row, 0, field) for row in (0, 1, 3, 5, 6) for field in ("generation", "prompt")]
    (hits,) = VectorIndex.open(job.index).search(np.ones(3), 100)
    assert sorted((hit.place.row, hit.place.sample, hit.place.field) for hit in hits) == left
    assert list(index_problems(job, manifest, parts, parts_are_whole=True)) == []


def test_a_filter_may_name_the_parts_own_columns_and_samples_apart(found: Found) -> None:
    assert found("row == 4") == vectors_of(4)
    assert found("id == '4' and job == 'mine'") == vectors_of(4)
    assert found("row == 4 and sample == 1") == [(4, 1, "generation")]
    assert found("job == 'other'") == []


def test_a_carried_column_goes_before_the_parts_own_of_that_name(found: Found) -> None:
    assert found("text == 'text 4'") == vectors_of(4)


def test_an_unknown_column_names_those_there_are(found: Found) -> None:
    with pytest.raises(UserError, match=r"no column 'years'; did you mean 'year'\?; there are lang, year, text, row"):
        found("years == 3")


def test_an_id_that_is_no_text_is_refused_in_one_line(job: JobFolder) -> None:
    with pytest.raises(UserError, match=r"^id '\\udcff' is no valid UTF-8"):
        matching_vectors(job.index, read_manifest(job.index), OfIds(["4", "\udcff"]), lambda _: job)


def test_what_the_values_make_impossible_is_told_of_the_filter(found: Found) -> None:
    with pytest.raises(UserError, match=r"^--filter 'year \* .*can't be told of the rows there are \(overflow\)"):
        found("year * 9223372036854775807 > 1")


def test_where_all_rows_are_deleted_a_filter_means_none(job: JobFolder) -> None:
    everything = np.arange(read_manifest(job.index).num_vectors)
    manifest = change_index(job, lambda draft, before: delete_vectors(draft, before, everything))
    assert not matching_vectors(job.index, manifest, Filter.parse("lang == 'en'"), lambda _: job).any()


def test_a_job_whose_directory_is_gone_is_still_known_by_its_name(job: JobFolder) -> None:
    manifest: Any = read_manifest(job.index)
    (mine,) = manifest.jobs
    gone = dataclasses.replace(mine, job="gone", num_vectors=6, path="../gone")
    rest = dataclasses.replace(mine, num_vectors=mine.num_vectors - 6)
    both = dataclasses.replace(manifest, jobs=(gone, rest))

    def matching(text: str) -> list[int]:
        wanted = Filter.parse(text)
        return np.flatnonzero(
            matching_vectors(job.index, both, wanted, lambda one: job if one.path == "." else job_folder(job.root, one))
        ).tolist()

    assert matching("job == 'gone'") == [*range(6)]
    assert matching("job != 'gone' and job in ('mine', 'gone')") == [*range(6, manifest.num_vectors)]
    with pytest.raises(JobError, match=r"put it back, or .* index delete .*out --filter \"job == 'gone'\"$"):
        matching("job == 'gone' and row == 3")


def test_a_column_that_only_another_job_has_is_missing_here(job: JobFolder, tmp_path: Path) -> None:
    manifest: Any = read_manifest(job.index)
    bare = JobFolder(tmp_path / "bare")
    bare.create()
    spec = {"output": {"columns": ["size"]}, "generate": None}
    write_job(bare, fingerprint="bare", document={"spec": spec})
    write_plan(bare, fingerprint="bare", splits=[], document={})
    other = dataclasses.replace(manifest.jobs[0], job="bare", num_vectors=0)
    both = dataclasses.replace(manifest, jobs=(*manifest.jobs, other))

    def folder_of(one: Any) -> JobFolder:
        return bare if one.job == "bare" else job

    assert matching_vectors(job.index, both, Filter.parse("size is None"), folder_of).all()
    assert not matching_vectors(job.index, both, Filter.parse("size == 3"), folder_of).any()
