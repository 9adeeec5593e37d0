"""A map of rows says the same one by one as by the table, in whichever row groups the vectors are."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipeline.index.row_map import GROUP_ROWS, SCHEMA, Place, RowMap, RowMapWriter
from pipeline.index.vectors import VectorBatch


def test_places_are_those_of_the_table_over_several_row_groups_in_the_order_asked_for(tmp_path: Path) -> None:
    count = GROUP_ROWS + 100
    with RowMapWriter.open(tmp_path / "rows.parquet", job="a") as rows:
        rows.add(
            VectorBatch(
                matrix=np.zeros((count, 1), np.float32),
                rows=np.arange(count) // 2,
                samples=(np.arange(count) % 2).astype(np.int32),
                fields=(np.arange(count) % 3 == 0).astype(np.int8),
            )
        )
    numbers = np.array([GROUP_ROWS + 7, 3, GROUP_ROWS - 1, GROUP_ROWS, 3])
    row_map = RowMap(tmp_path / "rows.parquet")
    table = row_map.table(numbers)

    assert table.schema == SCHEMA
    assert table["vector"].to_pylist() == numbers.tolist()
    assert row_map.places(numbers) == [
        Place(record["job"], record["row"], record["sample"], record["field"]) for record in table.to_pylist()
    ]
    assert row_map.places(numbers[1:2]) == [Place("a", 1, 1, "generation")]
    assert row_map.places([]) == []
