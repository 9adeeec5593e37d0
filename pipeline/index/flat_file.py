"""A Flat index written straight to its file, never held in memory: byte for byte what `faiss.write_index` writes.

Layout (little endian), as FAISS 1.15's index_write.cpp has it:

    "IxFI" d:i32 ntotal:i64 dummy:i64 dummy:i64 is_trained:u8 metric:i32    header; dummy is 1 << 20
    count:u64 (= ntotal * d)  then count float32                             the vectors

A shard whose vectors are not numbered from 0, one after another, has an id map around that ("IxM2", the header again,
the above, then ntotal:u64 and the numbers as i64), so that whoever opens it gets vector numbers, not places in it.
"""

from __future__ import annotations

import struct
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from pipeline.durable import HashedFile
from pipeline.index.manifest import Contents

_HEADER: Final = struct.Struct("<4siqqqBi")
_COUNT: Final = struct.Struct("<Q")
_DUMMY: Final = 1 << 20
_INNER_PRODUCT: Final = 0
_IDS_AT_ONCE: Final = 1 << 17


class FlatFile:
    """Takes exactly `num_vectors` vectors of width d; the block fails otherwise.

    They are numbered from `first_vector` on, or by `numbers`, which are ascending.
    """

    def __init__(
        self,
        path: Path,
        *,
        dimension: int,
        first_vector: int,
        num_vectors: int,
        numbers: npt.NDArray[np.int64] | None = None,
    ) -> None:
        self._path = path
        self._file = HashedFile(path)
        self._dimension = dimension
        self._first_vector = first_vector
        self._num_vectors = num_vectors
        self._numbers = numbers
        self._is_mapped = bool(first_vector) or numbers is not None
        self._num_added = 0

    def __enter__(self) -> Self:
        self._file.__enter__()
        if self._is_mapped:
            self._file.write(self._header(b"IxM2"))
        self._file.write(self._header(b"IxFI") + _COUNT.pack(self._num_vectors * self._dimension))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            assert self._num_added == self._num_vectors, f"{self._num_added} of {self._num_vectors} vectors came"
            if self._is_mapped:
                self._write_ids()
        self._file.__exit__(kind, error, trace)

    def add(self, matrix: npt.NDArray[np.float32]) -> None:
        """The next vectors [n, d]."""
        assert matrix.shape[1] == self._dimension
        self._file.write(np.ascontiguousarray(matrix, "<f4").reshape(-1).view(np.uint8).data)
        self._num_added += len(matrix)

    def contents(self) -> Contents:
        """To be asked after the block."""
        return Contents(
            file=self._path.name,
            sha256=self._file.sha256,
            size_bytes=self._file.size_bytes,
            first_vector=self._first_vector,
            num_vectors=self._num_vectors,
        )

    def _header(self, kind: bytes) -> bytes:
        return _HEADER.pack(kind, self._dimension, self._num_vectors, _DUMMY, _DUMMY, 1, _INNER_PRODUCT)

    def _write_ids(self) -> None:
        self._file.write(_COUNT.pack(self._num_vectors))
        if self._numbers is not None:
            self._file.write(self._numbers.astype("<i8").view(np.uint8).data)
            return
        end = self._first_vector + self._num_vectors
        for start in range(self._first_vector, end, _IDS_AT_ONCE):
            self._file.write(np.arange(start, min(start + _IDS_AT_ONCE, end), dtype="<i8").tobytes())
