"""The rows by which a job's gangs find out where experts belong: a sample spread over the input. Pure.

The same job has the same sample, whatever ran of it before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pipeline.source import Split
from workers.settings import CalibrationSettings, SamplePlace

AUTO_SHARE = 32  # one row in so many: reading a row's prompt is part of its work
AUTO_ROWS = 512  # at most
AUTO_LEAST_ROWS = 8  # below, it is not worth reading the experts again
AUTO_TOKENS = 1 << 16  # at most, over all places
PLACES = 32  # over the input, if the rows' number needs no more


def calibration_sample(
    splits: Sequence[Split], rows: int | Literal["auto"], *, rows_to_do: int
) -> CalibrationSettings | None:
    """`rows` as cluster.calibration_rows has it; `rows_to_do` in this run. None: nothing is measured."""
    total = sum(split.num_rows for split in splits)
    if rows == "auto":
        wanted = min(AUTO_ROWS, rows_to_do // AUTO_SHARE)
        if wanted < AUTO_LEAST_ROWS:
            return None
    else:
        wanted = min(rows, total)
    if not wanted:
        return None
    longest = max(split.num_rows for split in splits)
    count = min(len(splits), wanted, max(PLACES, -(-wanted // longest)))
    each, more = divmod(wanted, count)
    places = [
        SamplePlace(split=split.to_json(), rows=min(split.num_rows, each + (number < more)))
        for number, split in enumerate(splits[(2 * number + 1) * len(splits) // (2 * count)] for number in range(count))
    ]
    return CalibrationSettings(places=tuple(places), tokens_a_place=AUTO_TOKENS // count if rows == "auto" else None)
