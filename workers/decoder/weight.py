"""Handles on weights, so that packed, narrow or offloaded ones fit behind the functions in ops.py.

T tokens, V rows looked up. `DenseWeight` and `DenseBank` are the references; kernels/ has variants for the CPU.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor


class Weight(ABC):
    """One matrix [out, in], read by `ops.linear` and, as an embedding table, by `rows`."""

    shape: tuple[int, int]
    dtype: torch.dtype

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of memory held."""

    @abstractmethod
    def put(self, first_row: int, matrix: Tensor) -> None:
        """Fill the rows from first_row on with matrix [n, in]: how a weight made of several parts is loaded."""

    @abstractmethod
    def rows(self, ids: Tensor) -> Tensor:
        """ids [T] int64 -> [T, in] in the weight's dtype."""


class DenseWeight(Weight):
    """A plain tensor [out, in]."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.shape = (tensor.shape[0], tensor.shape[1])
        self.dtype = tensor.dtype

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def put(self, first_row: int, matrix: Tensor) -> None:
        self.tensor[first_row : first_row + matrix.shape[0]].copy_(matrix)

    def rows(self, ids: Tensor) -> Tensor:
        return self.tensor[ids]


class ExpertBank(ABC):
    """One matrix [out, in] in each slot; `experts[slot]` is the expert that the slot holds.

    The same indirection serves placement over ranks, replicas of hot experts, and offloading. A layer's experts have
    two banks with one slot order: gate and up in one, down in the other.
    """

    experts: tuple[int, ...]
    out_features: int
    in_features: int
    dtype: torch.dtype

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of memory held."""

    @abstractmethod
    def put(self, slot: int, first_row: int, matrix: Tensor) -> None:
        """Fill a slot's rows from first_row on with matrix [n, in]."""


class DenseBank(ExpertBank):
    """A plain tensor [slots, out, in]."""

    def __init__(
        self,
        experts: Sequence[int],
        out_features: int,
        in_features: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.experts = tuple(experts)
        self.out_features = out_features
        self.in_features = in_features
        self.dtype = dtype
        self.tensor = torch.empty(len(self.experts), out_features, in_features, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def put(self, slot: int, first_row: int, matrix: Tensor) -> None:
        self.tensor[slot, first_row : first_row + matrix.shape[0]].copy_(matrix)
