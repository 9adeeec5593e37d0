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

    `at` indexes the first dimension (an expert among stacked ones), `rows` then takes a run of rows, and `arrange`
    makes of what was read the tensor that we expect: it may reorder, turn, pick or add. Only the piece is read from
    disk. `arrange` is asked for the shape beforehand, with a tensor that holds no data, and has to have a hash.
    """

    name: str
    at: int | None = None
    rows: tuple[int, int] | None = None
    arrange: Callable[[Tensor], Tensor] | None = None


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
