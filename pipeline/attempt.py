"""A part on its way: the Parquet file under `_attempts/`, hashed as it is written and flushed before it is reported."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.durable import HashedFile, file_sha256, storage_errors, sync_folder
from pipeline.errors import JobError
from pipeline.records import embedded_fields

_ROW_GROUP_BYTES: Final = 128 << 20
_ROW_GROUP_ROWS: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """A part that was written and flushed, and is not yet real: what a shard hands to the controller."""

    split: int
    revision: int  # 0, and one more each time that the split is committed again
    path: str  # relative to the job directory
    sha256: str
    size_bytes: int
    first_row: int
    rows: int  # rows of the job, which are fewer than the split's where a limit cut it short
    records: int  # rows of the Parquet file
    samples: int  # records of a row that did not fail
    errors: int  # rows that failed
    error_codes: Mapping[str, int]  # how many rows failed with which code
    vectors: Mapping[str, int]  # "prompt", "generation" -> how many vectors of it; empty where nothing is embedded
    prompt_tokens: int  # summed over rows, the samples of a row counted once
    completion_tokens: int

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(document: Mapping[str, Any]) -> Attempt:
        return Attempt(**document)


def write_part(table: pa.Table, path: Path) -> tuple[str, int]:
    """Writes `table` to `path`, which must not exist, and flushes file and name: (sha256, size in bytes).

    JobError where the storage fails; nothing is left then.
    """
    group_rows = _ROW_GROUP_ROWS
    if table.nbytes > _ROW_GROUP_BYTES:
        group_rows = max(table.num_rows * _ROW_GROUP_BYTES // table.nbytes, 1)
    with storage_errors("writing", path):
        with HashedFile(path) as file, pq.ParquetWriter(file.sink, table.schema, **_settings(table.schema)) as writer:
            writer.write_table(table, row_group_size=group_rows)
        sync_folder(path.parent)
    return file.sha256, file.size_bytes


def records_to_keep(path: Path, sha256: str, *, retry_errors: bool) -> pa.Table:
    """The records of a committed part that its next revision takes over: all, or all but the failed rows'.

    JobError if the file is not what was committed.
    """
    with storage_errors("reading", path):
        found = file_sha256(path)
    if found != sha256:
        raise JobError(f"{path} is damaged: its sha256 is not the one in its commit")
    table = pq.read_table(path, partitioning=None)
    return table.filter(pc.is_null(table["error_code"])) if retry_errors else table


@lru_cache(maxsize=8)
def _settings(schema: pa.Schema) -> dict[str, Any]:
    """How each column is stored.

    Dictionaries only where few values repeat: building one over long texts costs four times the writing. Vectors are
    not compressed: it takes longer than everything else together and saves a tenth.
    """
    vectors = tuple(f"{name}." for name in embedded_fields(schema))
    sample = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), sample)
    stored = pq.ParquetFile(pa.BufferReader(sample.getvalue())).schema
    leaves = [stored.column(number).path for number in range(len(stored.names))]
    return {
        "compression": {path: "none" if path.startswith(vectors) else "zstd" for path in leaves},
        "use_dictionary": ["finish_reason", "error_code"],
        "write_statistics": [path for path in leaves if path in schema.names and path not in ("text", "error_message")],
    }
