"""Where records begin in a file without an index of its own: byte offsets of every n-th one, in bounded memory."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.formats.base import Position


class Marks:
    """Byte offsets of records 0, stride, 2 * stride, ...; the stride doubles whenever there would be too many.

    >>> marks = Marks(max_marks=4)
    >>> marks.add(np.array([0, 10, 20, 30, 40, 50]))
    >>> marks.stride, marks.position(5)
    (2, {'byte': 40, 'skip': 1})
    """

    def __init__(self, max_marks: int) -> None:
        self._max_marks = max(2, max_marks)
        self._offsets: list[NDArray[np.int64]] = []
        self._num_marks = 0
        self.stride = 1
        self.num_rows = 0

    def add(self, offsets: NDArray[np.int64]) -> None:
        """The offsets of the records that follow those added so far."""
        first = -self.num_rows % self.stride
        kept = offsets[first :: self.stride].copy()
        self.num_rows += len(offsets)
        self._num_marks += len(kept)
        self._offsets.append(kept)
        while self._num_marks > self._max_marks:
            self._offsets = [np.concatenate(self._offsets)[::2].copy()]
            self._num_marks = len(self._offsets[0])
            self.stride *= 2

    def position(self, row: int) -> Position:
        """The last marked record at or before `row`, and how many records lie between."""
        if len(self._offsets) > 1:
            self._offsets = [np.concatenate(self._offsets)]
        return {"byte": int(self._offsets[0][row // self.stride]), "skip": row % self.stride}
