"""The sample by which experts are placed: spread over the input, small beside the job, the same each time."""

from __future__ import annotations

import pytest

from jobs.experts.calibration_sample import AUTO_TOKENS, calibration_sample
from pipeline.source import Split


def splits(*rows: int) -> list[Split]:
    return [
        Split(index=i, file=0, first_row=sum(rows[:i]), num_rows=count, start={"row": sum(rows[:i])})
        for i, count in enumerate(rows)
    ]


@pytest.mark.parametrize(
    ("asked", "to_do", "rows"),
    [
        ("auto", 64_000, 512),
        ("auto", 3200, 100),
        ("auto", 255, None),
        (0, 64_000, None),
        (7, 64_000, 7),
        (10**9, 1, 64_000),
    ],
)
def test_it_is_as_large_as_asked_or_a_small_part_of_what_is_to_be_done(asked, to_do, rows) -> None:
    sample = calibration_sample(splits(*[64] * 1000), asked, rows_to_do=to_do)
    assert (None if sample is None else sum(place.rows for place in sample.places)) == rows


def test_places_are_spread_over_the_input() -> None:
    sample = calibration_sample(splits(*[64] * 1000), "auto", rows_to_do=64_000)
    assert sample is not None
    indices = [place.split["index"] for place in sample.places]
    assert len(set(indices)) == 32
    assert indices[0] < 32
    assert indices[-1] >= 1000 - 32
    assert sample.tokens_a_place == AUTO_TOKENS // 32


def test_what_is_asked_for_is_read_whole_from_as_many_places_as_that_takes() -> None:
    sample = calibration_sample(splits(8, 8, 3), 19, rows_to_do=19)
    assert sample is not None
    assert [(place.split["index"], place.rows) for place in sample.places] == [(0, 7), (1, 6), (2, 3)]
    assert sample.tokens_a_place is None
