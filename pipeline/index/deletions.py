"""deleted.parquet: the numbers of vectors that an index still holds and never finds again.

FAISS can remove vectors from few kinds of index, and would number the others anew. So for all kinds a deletion is a
tombstone: files of vectors stay as they are, and search leaves the numbers out before it ranks.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.durable import HashedFile
from pipeline.errors import JobError, one_line
from pipeline.index import faiss_files
from pipeline.index.manifest import BUILT_AGAIN, Contents, IndexManifest

DELETED_NAME: Final = "deleted.parquet"
SCHEMA: Final = pa.schema({"vector": pa.int64()})

Numbers = npt.NDArray[np.int64]


def write_deleted(path: Path, numbers: Numbers) -> Contents:
    """`numbers`: ascending, each once. `path` must not exist; it is flushed."""
    with HashedFile(path) as file:
        table = pa.table([pa.array(numbers)], schema=SCHEMA)
        encoding = {"vector": "DELTA_BINARY_PACKED"}
        pq.write_table(table, file.sink, compression="zstd", use_dictionary=False, column_encoding=encoding)
    return Contents(
        file=path.name,
        sha256=file.sha256,
        size_bytes=file.size_bytes,
        first_vector=0,
        num_vectors=len(numbers),
    )


def read_deleted(folder: Path, manifest: IndexManifest) -> Numbers | None:
    """The numbers, ascending, or None where none were deleted. JobError if their file is missing or damaged."""
    if manifest.deleted is None:
        return None
    path = faiss_files.check_file(folder, manifest.deleted)
    count = manifest.deleted.num_vectors
    try:
        with pq.ParquetFile(path) as file:
            if not file.schema_arrow.equals(SCHEMA):
                raise JobError(f"{path} is no list of vector numbers; remove it and {BUILT_AGAIN}")
            listed = file.metadata.num_rows
            column: Any = file.read()["vector"].combine_chunks() if listed == count else pa.nulls(0)
    except (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
        raise JobError(f"{path} can't be read: {one_line(error)}") from error
    if len(column) == count and column.null_count == 0:
        numbers: Numbers = column.to_numpy(zero_copy_only=False)
        is_within = count == 0 or (numbers[0] >= 0 and numbers[-1] < manifest.num_vectors)
        if is_within and (np.diff(numbers) > 0).all():
            return numbers
    raise JobError(
        f"{path} does not list {count} vectors of the index, each once, in order; remove it and {BUILT_AGAIN}"
    )


def delete_vectors(draft: Path, manifest: IndexManifest, numbers: Numbers) -> IndexManifest:
    """A change of `versions.change_index`: these are not to be found any more, nor are those deleted before."""
    before = read_deleted(draft, manifest)
    merged: Numbers = np.union1d(numbers, before) if before is not None else np.unique(numbers)
    path = draft / DELETED_NAME
    path.unlink(missing_ok=True)
    return dataclasses.replace(manifest, deleted=write_deleted(path, merged.astype(np.int64)))


def is_all_deleted(deleted: Numbers | None, first: int, count: int) -> bool:
    """Whether none of `count` vectors from number `first` on is left, of some."""
    if deleted is None or count == 0:
        return False
    low, high = np.searchsorted(deleted, (first, first + count))
    return bool(high - low == count)
