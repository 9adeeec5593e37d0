"""The mean of a corpus's vectors, taken out of each: what all texts have in common says nothing about any of them.

Vectors of a decoder that was never trained to embed lie in a narrow cone; without their mean they spread (Mu and
Viswanath 2018, arXiv 1702.01417). The mean is that of the whole corpus and is stored with the index, so that neither a
batch nor a part decides about a vector. Parts keep the vectors as they were. d: width of a vector; n: vectors.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from pipeline.durable import HashedFile
from pipeline.errors import JobError, one_line
from pipeline.index.manifest import Contents

CENTER_NAME: Final = "center.npy"
# A vector nearer to the mean than this has no direction but rounding; it becomes zeros, which score 0 with everything.
_NEAREST: Final = 1e-6


class Centering:
    """Takes `center` float32 [d] out of vectors of unit length, and gives them unit length again."""

    def __init__(self, center: npt.NDArray[np.float32]) -> None:
        self.center = center

    @classmethod
    def of(cls, matrices: Iterable[npt.NDArray[np.float32]], dimension: int) -> Self:
        """The mean of all rows of `matrices` [n, d], summed in their order in float64."""
        total, count = np.zeros(dimension), 0
        for matrix in matrices:
            total += matrix.sum(axis=0, dtype=np.float64)
            count += len(matrix)
        return cls((total / max(count, 1)).astype(np.float32))

    @classmethod
    def read(cls, path: Path, dimension: int) -> Self:
        """From a file whose hash was checked. JobError if it holds something else."""
        try:
            center = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise JobError(f"{path} can't be read: {one_line(error)}") from error
        is_vector = isinstance(center, np.ndarray) and center.dtype == np.float32 and center.shape == (dimension,)
        if not is_vector or not np.isfinite(center).all():
            raise JobError(f"{path} does not hold one vector of width {dimension}")
        return cls(center)

    def write(self, path: Path, *, num_vectors: int) -> Contents:
        """`num_vectors`: those that it is the mean of."""
        stream = io.BytesIO()
        np.save(stream, self.center, allow_pickle=False)
        with HashedFile(path) as file:
            file.write(stream.getvalue())
        return Contents(
            file=path.name,
            sha256=file.sha256,
            size_bytes=file.size_bytes,
            first_vector=0,
            num_vectors=num_vectors,
        )

    def apply(self, matrix: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """matrix [n, d] -> [n, d]. A row's result depends on that row alone, bit for bit."""
        moved = matrix.astype(np.float64) - self.center
        lengths = np.sqrt(np.square(moved).sum(axis=1, keepdims=True))
        result: npt.NDArray[np.float32] = np.divide(
            moved, lengths, out=np.zeros_like(moved), where=lengths > _NEAREST
        ).astype(np.float32)
        return result
