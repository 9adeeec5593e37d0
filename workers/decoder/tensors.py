"""How parts of the decoder ask a checkpoint for their tensors."""

from __future__ import annotations

import dataclasses
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

    def check(self, name: str, *shape: int) -> None:
        """Complain of a tensor that isn't as the configuration says before room is made for it."""
        self.checkpoint.check(self.prefix + name, shape)

    def vector(self, name: str, width: int) -> Tensor:
        """[width] float32: norms and biases, which are small and sensitive."""
        return self.checkpoint.read(self.prefix + name, (width,), torch.float32).to(self.device)

    def matrix(self, name: str, out_features: int, in_features: int) -> Tensor:
        """[out, in] in the model's dtype, float32 where that is int8: handles quantize. Still on the processor."""
        dtype = torch.float32 if self.dtype == torch.int8 else self.dtype
        return self.checkpoint.read(self.prefix + name, (out_features, in_features), dtype)

    def unquantized(self) -> Tensors:
        """The same, float32 where int8 was asked for: for what is small and sensitive, such as routers."""
        return dataclasses.replace(self, dtype=torch.float32) if self.dtype == torch.int8 else self

    def weight(self, in_features: int, *parts: tuple[str, int]) -> Weight:
        """One weight out of parts of (name, out), one below the other. Never more than one part in memory twice."""
        for name, out_features in parts:
            self.check(name, out_features, in_features)
        # The weight comes first, so that the parts' memory is free again behind it and not in holes between weights.
        weight = ops.new_weight(sum(out for _, out in parts), in_features, dtype=self.dtype, device=self.device)
        begin = 0
        for name, out_features in parts:
            weight.put(begin, self.matrix(name, out_features, in_features))
            begin += out_features
        return weight

    def vectors(self, *parts: tuple[str, int]) -> Tensor:
        """Vectors of (name, width) one after the other, float32."""
        return torch.cat([self.vector(name, width) for name, width in parts])
