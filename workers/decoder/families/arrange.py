"""How published tensors become ours: what `Source.arrange` can be. None changes its argument."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


def one_more(weight: Tensor) -> Tensor:
    """Gemma stores what a norm multiplies by less 1."""
    return weight + 1


@dataclass(frozen=True, slots=True)
class Turned:
    """Rows `begin` to `end` - 1 of a matrix that is stored [in, out], as GPT-2's Conv1D does; all of them without.

    Every `step`-th of them: gpt-oss has the columns of two projections in turns.
    """

    begin: int = 0
    end: int | None = None
    step: int = 1

    def __call__(self, matrix: Tensor) -> Tensor:
        return matrix[:, self.begin : self.end : self.step].T


@dataclass(frozen=True, slots=True)
class OfEachHead:
    """Part `part` of `parts` of each head's rows: query, key and value lie together head by head in GPT-NeoX, BLOOM."""

    part: int
    parts: int
    num_heads: int

    def __call__(self, rows: Tensor) -> Tensor:
        return rows.view(self.num_heads, self.parts, -1, *rows.shape[1:])[:, self.part].flatten(0, 1)
