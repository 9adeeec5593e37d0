"""Hear which experts token sequences choose. T tokens, C model width, k experts a token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.decoder.attention import AttentionMetadata
from workers.decoder.model import Decoder
from workers.parallel.dispatch import Compute, Dispatcher
from workers.parallel.expert_work import ExpertWork

# Is told a decoder layer's index and its tokens' experts, [T, k] int64, ascending in each row.
ChoiceListener = Callable[[int, NDArray[np.int64]], None]

_BLOCK_TOKENS = 64
_STEP_TOKENS = 1024  # that are run at once, unless one sequence is longer


class ListeningDispatcher(Dispatcher):
    """Tells a listener what routers chose, and has another dispatcher do the work. Changes no result.

    It is the seam for any decoder, alone or a rank of a gang: each rank hears of its own tokens, once.
    """

    def __init__(self, inner: Dispatcher, listener: ChoiceListener) -> None:
        self.inner = inner
        self.listener = listener

    def run(
        self, layer: int, num_experts: int, x: Tensor, expert_ids: Tensor, weights: Tensor, compute: Compute
    ) -> Tensor:
        self.listener(layer, expert_ids.cpu().numpy())
        return self.inner.run(layer, num_experts, x, expert_ids, weights, compute)

    def work(self) -> ExpertWork:
        return self.inner.work()

    def clear(self) -> None:
        self.inner.clear()


@contextmanager
def listening(decoder: Decoder, listener: ChoiceListener) -> Iterator[None]:
    """While it lasts, tell the listener what each layer's tokens choose in each step."""
    plain = decoder.dispatcher
    decoder.dispatcher = ListeningDispatcher(plain, listener)
    try:
        yield
    finally:
        decoder.dispatcher = plain


def run_sequences(decoder: Decoder, sequences: Iterable[Sequence[int]]) -> None:
    """Run token sequences through a decoder that holds all experts, and keep nothing of it.

    Sequences are packed into steps of about a thousand tokens; peak memory is the cache of one step. ValueError for one
    longer than the model's context.
    """
    for step in _steps(sequences, decoder.config.max_context):
        _run(decoder, step)


def _steps(sequences: Iterable[Sequence[int]], max_context: int) -> Iterable[list[Sequence[int]]]:
    step: list[Sequence[int]] = []
    for sequence in sequences:
        if len(sequence) > max_context:
            raise ValueError(f"a sequence of {len(sequence)} tokens, where the context holds {max_context}")
        if step and sum(map(len, step)) + len(sequence) > _STEP_TOKENS:
            yield step
            step = []
        if sequence:
            step.append(sequence)
    if step:
        yield step


def _run(decoder: Decoder, sequences: Sequence[Sequence[int]]) -> None:
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    blocks = -(-lengths // _BLOCK_TOKENS)
    first = blocks.cumsum(0) - blocks
    positions = torch.cat([torch.arange(length) for length in lengths.tolist()])
    table = torch.arange(int(blocks.max())).expand(len(sequences), -1)
    metadata = AttentionMetadata(
        query_start=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().to(decoder.device),
        context_lens=lengths.int().to(decoder.device),
        block_table=torch.where(table < blocks[:, None], table + first[:, None], -1).int().to(decoder.device),
        slots=(first.repeat_interleave(lengths) * _BLOCK_TOKENS + positions).to(decoder.device),
    )
    pools = decoder.new_pools([int(blocks.sum())] * len(decoder.groups), _BLOCK_TOKENS)
    ids = torch.tensor([token for sequence in sequences for token in sequence], device=decoder.device)
    decoder.forward(ids, positions.to(decoder.device), [metadata] * len(decoder.groups), pools)
