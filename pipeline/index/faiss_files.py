"""FAISS's own files: made from a factory string, written and flushed, and read only after our hash has checked them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import faiss
import numpy as np
import numpy.typing as npt

from pipeline.durable import file_sha256, storage_errors
from pipeline.errors import JobError, UserError
from pipeline.index.kinds import AUTO, DEFAULT_MEMORY_BYTES, choose_kind
from pipeline.index.manifest import Contents

FLAT: Final = "Flat"
_LIMIT_SLACK_BYTES: Final = 1 << 20


@contextmanager
def faiss_threads(threads: int | None) -> Iterator[None]:
    """FAISS uses `threads` threads in the block, or as many as before where it is None. It is the process's setting."""
    before = faiss.omp_get_max_threads()
    if threads is not None:
        faiss.omp_set_num_threads(threads)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def settled_kind(kind: str, *, num_vectors: int, dimension: int, memory_bytes: int | None) -> str:
    """`auto` -> what `kinds.choose_kind` says; any spelling of flat -> Flat; else the factory string as it is."""
    asked = kind.strip()
    if asked.lower() == AUTO:
        return choose_kind(num_vectors, dimension, DEFAULT_MEMORY_BYTES if memory_bytes is None else memory_bytes)
    return FLAT if asked.lower() == FLAT.lower() else asked


def make_index(kind: str, dimension: int) -> Any:
    """An empty inner-product index. UserError where FAISS doesn't know the factory string or can't have it so wide."""
    try:
        return faiss.index_factory(dimension, kind, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise UserError(
            f"index.kind {kind!r} is no FAISS factory string for {dimension} dimensions: {_reason(error)}"
        ) from error


def num_training_vectors(index: Any, limit: int) -> int:
    """How many vectors to train `index` on: 64 a list, enough for product quantizers, at most `limit`; 0 for none."""
    if index.is_trained:
        return 0
    ivf = faiss.try_extract_index_ivf(index)
    num_lists = ivf.nlist if ivf is not None else 0
    return min(max(64 * num_lists, 1 << 14), limit)


def train(index: Any, sample: npt.NDArray[np.float32], kind: str) -> None:
    """UserError where there are too few vectors for this kind of index."""
    try:
        index.train(sample)
    except RuntimeError as error:
        raise UserError(f"index.kind {kind!r} can't be trained on {len(sample)} vectors: {_reason(error)}") from error


def with_numbers(index: Any, first_vector: int) -> Any:
    """`index` made to give the vectors added to it numbers from `first_vector` on."""
    inner: Any = faiss.downcast_index(index)
    while isinstance(inner, faiss.IndexPreTransform):
        inner = faiss.downcast_index(inner.index)
    if first_vector == 0 or isinstance(inner, faiss.IndexIVF):
        return index
    return faiss.IndexIDMap2(index)


def add_numbered(index: Any, matrix: npt.NDArray[np.float32], number: int) -> None:
    """Adds vectors [n, d] whose first has `number`; `index` comes from `with_numbers`. JobError where FAISS fails."""
    try:
        if index.ntotal == number:
            index.add(matrix)
        else:
            index.add_with_ids(matrix, np.arange(number, number + len(matrix)))
    except (RuntimeError, MemoryError) as error:
        raise JobError(f"FAISS can't add vectors {number} to {number + len(matrix) - 1}: {_reason(error)}") from error


def write_index(index: Any, path: Path, *, first_vector: int) -> Contents:
    """JobError where the storage fails."""
    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:
        raise JobError(f"writing {path} failed: {_reason(error)}") from error
    with storage_errors("writing", path):
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        return Contents(
            file=path.name,
            sha256=file_sha256(path),
            size_bytes=path.stat().st_size,
            first_vector=first_vector,
            num_vectors=index.ntotal,
        )


def check_file(folder: Path, contents: Contents) -> Path:
    """The path of one file of the index. JobError unless its bytes are those that were written."""
    path = folder / contents.file
    if not path.is_file():
        raise JobError(f"{path} is missing: build the index again (`gristmill run` does)")
    with storage_errors("reading", path):
        damaged = path.stat().st_size != contents.size_bytes or file_sha256(path) != contents.sha256
    if damaged:
        raise JobError(f"{path} is damaged: its sha256 is not the one in index.json; remove index/ and run again")
    return path


def read_shard(folder: Path, shard: Contents, *, dimension: int) -> Any:
    """The FAISS index of one shard, which FAISS gets to see only when its hash is right. JobError otherwise."""
    path = check_file(folder, shard)
    try:
        with _deserialization_limits(shard.size_bytes):
            index = faiss.read_index(str(path))
    except (RuntimeError, MemoryError) as error:
        raise JobError(f"{path} can't be read by FAISS: {_reason(error)}") from error
    if index.d != dimension or index.ntotal != shard.num_vectors or index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise JobError(
            f"{path} holds {index.ntotal} vectors of width {index.d}, "
            f"and index.json says {shard.num_vectors} of width {dimension} by inner product"
        )
    return index


@contextmanager
def _deserialization_limits(size_bytes: int) -> Iterator[None]:
    """No vector that FAISS reads from a file may be much larger than the file. The setting is the process's."""
    vector_limit = faiss.get_deserialization_vector_byte_limit()
    loop_limit = faiss.get_deserialization_loop_limit()
    faiss.set_deserialization_vector_byte_limit(2 * size_bytes + _LIMIT_SLACK_BYTES)
    faiss.set_deserialization_loop_limit(size_bytes + _LIMIT_SLACK_BYTES)
    try:
        yield
    finally:
        faiss.set_deserialization_vector_byte_limit(vector_limit)
        faiss.set_deserialization_loop_limit(loop_limit)


def _reason(error: Exception) -> str:
    """FAISS's message without the C++ signature and the source line."""
    text = " ".join(str(error).split())
    _, separator, after = text.rpartition("Error: ")
    if separator and "failed: " in after:
        after = after.partition("failed: ")[2] or after
    elif not separator:
        after = text.rpartition(".cpp:")[2].partition(": ")[2] or text
    return after
