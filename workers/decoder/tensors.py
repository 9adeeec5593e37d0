"""How parts of the decoder ask a checkpoint for their tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.decoder import ops
from workers.decoder.checkpoint import Checkpoint
from workers.decoder.weight import Weight


@dataclass(frozen=True, slots=True)
class Tensors:
    """The tensors below one name of ours, for instance `layers.3.attention`, bound for one device and dtype.

    Every read checks the shape that the configuration implies; a checkpoint that has it otherwise is a UserError.
    """

    checkpoint: Checkpoint
    prefix: str
    dtype: torch.dtype
    device: torch.device

    def under(self, name: str) -> Tensors:
        return Tensors(self.checkpoint, f"{self.prefix}{name}.", self.dtype, self.device)

    def vector(self, name: str, width: int) -> Tensor:
        """[width] float32: norms and biases, which are small and sensitive."""
        return self.checkpoint.read(self.prefix + name, (width,), torch.float32).to(self.device)

    def matrix(self, name: str, out_features: int, in_features: int) -> Tensor:
        """[out, in] on the processor, in the model's dtype; the caller owns the memory."""
        return self.checkpoint.read(self.prefix + name, (out_features, in_features), self.dtype)

    def weight(self, name: str, out_features: int, in_features: int) -> Weight:
        return ops.new_weight(self.matrix(name, out_features, in_features).to(self.device))

    def stacked_weight(self, names: Sequence[tuple[str, int]], in_features: int) -> Weight:
        """One weight out of several: names of (name, out) one below the other. One more part in memory at most."""
        return ops.new_weight(self.stacked_matrix(names, in_features).to(self.device))

    def stacked_matrix(self, names: Sequence[tuple[str, int]], in_features: int) -> Tensor:
        """As `stacked_weight`, the plain matrix on the processor."""
        whole = torch.empty(sum(out for _, out in names), in_features, dtype=self.dtype)
        begin = 0
        for name, out_features in names:
            whole[begin : begin + out_features] = self.matrix(name, out_features, in_features)
            begin += out_features
        return whole

    def stacked_vector(self, names: Sequence[tuple[str, int]]) -> Tensor:
        return torch.cat([self.vector(name, width) for name, width in names])
