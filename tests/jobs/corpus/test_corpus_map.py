"""The map of the corpus: which rows are its points, what they say, and what they are coloured by."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jobs.corpus import corpus_map
from jobs.corpus.corpus_map import CorpusMap, FailedRow, MapPoint, make_map
from jobs.page.point_map import TEXT_BYTES, cut, point_map
from pipeline.commits import Commit
from pipeline.found_rows import FoundRow
from pipeline.index.vectors import part_vectors
from pipeline.job_folder import JobFolder

Committed = Callable[..., tuple[JobFolder, dict[int, Commit]]]


def test_points_are_rows_with_their_texts_and_failed_rows_are_aside(
    committed: Committed, text_of: Callable[[int], str]
) -> None:
    folder, commits = committed(60)
    found = make_map(folder, commits)
    assert found is not None
    assert [point.row for point in found.points] == [row for row in range(60) if row % 10 != 5]
    assert all(point.text == text_of(point.row) for point in found.points)
    assert [row.row for row in found.failed] == [5, 15, 25, 35, 45, 55]
    assert found.failed[0] == FailedRow(row=5, id="5", code="not_text", message="it holds <null>")
    assert found.summary() | {"groups": None} == {
        "rows": 60,
        "points": 54,
        "method": "t-SNE",
        "centred": False,
        "grouped_by": "clusters",
        "groups": None,
    }


def test_clusters_are_named_after_the_words_that_tell_them_apart(
    committed: Committed, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_map, "NUM_CLUSTERS", 3)
    found = make_map(*committed(100))
    assert found is not None
    names = {frozenset(name.split(", ")) for name, _ in found.groups}
    assert names == {frozenset(subject.split()) for subject in words}
    for point in found.points:
        assert set(found.groups[point.group][0].split(", ")) == set(words[point.row % 3].split())


def test_a_carried_column_with_few_values_gives_the_colours(committed: Committed) -> None:
    found = make_map(*committed(60, kinds=2))
    assert found is not None
    assert found.grouped_by == "kind"
    assert found.groups == (("kind 0", 30), ("kind 1", 24))
    assert all(found.groups[point.group][0] == f"kind {point.row % 2}" for point in found.points)


def test_of_many_rows_few_are_looked_at_evenly(committed: Committed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_map, "MAX_POINTS", 12)
    monkeypatch.setattr(corpus_map, "MAX_PARTS", 4)
    folder, commits = committed(200)
    read = []

    def spying(folder: JobFolder, commit: Commit) -> Any:
        read.append(commit.split)
        return part_vectors(folder, commit)

    monkeypatch.setattr(corpus_map, "part_vectors", spying)
    found = make_map(folder, commits)
    assert found is not None
    assert read == [2, 7, 12, 17]
    rows = [point.row for point in found.points] + [row.row for row in found.failed]
    assert len(rows) == 12
    assert {row // 50 for row in rows} == {0, 1, 2, 3}
    assert found.rows == 200


def test_of_rows_that_take_turns_the_map_has_all_kinds(committed: Committed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_map, "MAX_POINTS", 50)
    found = make_map(*committed(200, kinds=2))
    assert found is not None
    assert {name for name, _ in found.groups} == {"kind 0", "kind 1"}
    assert min(points for _, points in found.groups) > 10


def test_the_rows_of_the_first_run_are_the_map_of_a_job_that_limit_cut(committed: Committed) -> None:
    folder, commits = committed(40)
    found = make_map(folder, {split: commit for split, commit in commits.items() if split < 2})
    assert found is not None
    assert found.rows == 20
    assert max(point.row for point in found.points) == 19


def test_without_vectors_there_is_no_map(committed: Committed) -> None:
    folder, _ = committed(10)
    assert make_map(folder, {}) is None


def found_row(row: int, **columns: Any) -> FoundRow:
    return FoundRow(row=row, id=str(row), sample=0, generation=None, passage="text", columns=columns)


def test_columns_of_other_types_or_of_nearly_all_different_values_give_no_groups() -> None:
    rows = [found_row(row, when=[1], name=f"name {row // 3}", flag=row % 2 == 0) for row in range(24)]
    vectors = np.eye(24, dtype=np.float32)
    column, names, members = corpus_map.group(rows, ["text"] * 24, vectors)
    assert (column, names) == ("flag", ["True", "False"])
    assert members == [0, 1] * 12
    assert corpus_map.group([found_row(row) for row in range(24)], ["text"] * 24, vectors) == ("", ["all"], [0] * 24)


def test_a_cluster_is_not_named_after_a_word_that_is_as_common_elsewhere() -> None:
    rows = [found_row(row) for row in range(60)]
    texts = [f"everywhere {'alpha' if row < 35 else 'beta'}" for row in range(60)]
    vectors = np.repeat(np.eye(2, dtype=np.float32), [35, 25], axis=0)
    assert corpus_map.group(rows, texts, vectors)[1] == ["alpha", "beta"]


def a_map(points: list[MapPoint], failed: tuple[FailedRow, ...] = ()) -> CorpusMap:
    return CorpusMap(
        rows=len(points),
        method="PCA",
        centred=False,
        grouped_by="",
        groups=(("all", len(points)),),
        points=tuple(points),
        failed=failed,
    )


def point(number: int, **values: Any) -> MapPoint:
    random = np.random.default_rng(number)
    x, y = random.normal(size=2)
    defaults = {"x": x, "y": y, "row": number, "id": str(number), "group": 0, "text": "text", "generation": None}
    return MapPoint(**defaults | values)


@pytest.mark.parametrize("letter", ["a", "<", "\U0001f600", "\ud800", "\x00"])
def test_two_thousand_points_stay_below_two_megabytes_whatever_their_texts_are(letter: str) -> None:
    long = letter * 5000
    drawn = point_map(a_map([point(number, text=long, generation=long, id=long) for number in range(2000)]))
    assert len(drawn.encode()) < 1_700_000


def test_a_cut_text_is_its_beginning() -> None:
    assert cut("short", TEXT_BYTES) == "short"
    assert cut("a" * 500, 20) == "a" * 17 + "…"
    assert cut("<<<<<<", 14) == "<<…"


def test_points_lie_inside_the_map_with_both_directions_at_the_same_scale() -> None:
    corners = [point(0, x=0.0, y=0.0), point(1, x=4.0, y=0.0), point(2, x=0.0, y=1.0)]
    drawn = ET.fromstring(point_map(a_map(corners, (FailedRow(row=3, id="c", code="not_text", message="null"),))))
    _, _, width, height = map(float, drawn.get("viewBox", "").split())
    dots = [dot for dot in drawn.iter("circle") if "point" in dot.get("class", "")]
    places = [(float(dot.get("cx", "")), float(dot.get("cy", ""))) for dot in dots]
    assert all(0 < x < width and 0 < y < height for x, y in places)
    assert places[1][0] - places[0][0] == pytest.approx(4 * (places[0][1] - places[2][1]), rel=0.01)
    said = [title.text for title in drawn.iter("title")]
    assert said[0] == "row 0\ntext"
    assert said[-1] == "row 3 · c\nnot_text: null"
