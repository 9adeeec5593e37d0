"""The published tensors of a checkpoint, by the names they were published under."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Source:
    """Where one tensor of ours is found: a published tensor, or a piece of one.

    `at` indexes the first dimension (an expert among stacked ones), `rows` then takes every `step`-th of a run of rows,
    and `arrange` makes of what was read the tensor that we expect: it may reorder, turn, pick or add. Only the piece is
    read from disk. `arrange` is asked for the shape beforehand, with a tensor that holds no data, and has to have a
    hash. With `scales` the tensor holds blocks of MXFP4 numbers, and `scales` theirs.
    """

    name: str
    at: int | None = None
    rows: tuple[int, int] | None = None
    step: int = 1
    arrange: Callable[[Tensor], Tensor] | None = None
    scales: str | None = None

    def piece(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """The shape of the piece, as numbers before `arrange`, of a tensor of `shape`; None where it has no such."""
        if self.scales is not None:  # [..., blocks, bytes], two numbers a byte
            if len(shape) < 2:
                return None
            shape = (*shape[:-2], shape[-2] * shape[-1] * 2)
        if self.at is not None:
            if not shape or self.at >= shape[0]:
                return None
            shape = shape[1:]
        if self.rows is not None:
            if not shape or self.rows[1] > shape[0]:
                return None
            shape = (len(range(*self.rows, self.step)), *shape[1:])
        return shape


class Storage(ABC):
    """Reads tensors one at a time. Peak memory of a read: what it returns, and the same piece in its stored format."""

    @property
    @abstractmethod
    def names(self) -> Collection[str]: ...

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]: ...

    @abstractmethod
    def where(self, name: str) -> str:
        """The file that holds `name`, for messages."""

    @abstractmethod
    def read(self, source: Source, dtype: torch.dtype) -> Tensor:
        """The piece that `source` names, in `dtype`, in memory of its own. UserError when the file isn't as it says."""
