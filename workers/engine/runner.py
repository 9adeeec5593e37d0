"""A step's plain data -> tensors -> the decoder -> hidden states, logits and pooled vectors.

T tokens of the step, S sequences, B blocks in a table's row, C model width, V vocabulary, W router width,
N rows that draw.
"""

from __future__ import annotations

from array import array

import numpy as np
import numpy.typing as npt
import torch

from workers.decoder.attention import AttentionMetadata
from workers.decoder.model import Decoder
from workers.engine.kv_cache import KVCache
from workers.engine.scheduler import StepBatch

Int32s = npt.NDArray[np.int32]


class Runner:
    """Executes steps on one decoder and its cache."""

    def __init__(self, decoder: Decoder, cache: KVCache) -> None:
        self.decoder = decoder
        self.cache = cache

    def hidden(self, batch: StepBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Copy blocks, then compute the step's tokens -> hidden states after the final norm [T, C].

        Beside them, where a pooled sequence wants it, what the routers say: a softmax over experts a layer [T, W].

        A batch without tokens runs too: with experts on other ranks, every rank must join each exchange.
        """
        self.cache.copy_blocks(batch.copies)
        starts = np.array(batch.starts, dtype=np.int64)
        counts = np.array(batch.counts, dtype=np.int64)
        query_start = np.zeros(len(counts) + 1, dtype=np.int32)
        np.cumsum(counts, out=query_start[1:])
        sequence_of = np.repeat(np.arange(len(counts)), counts)  # [T]
        positions = np.arange(query_start[-1]) - (query_start[:-1] - starts)[sequence_of]
        shared = self._tensor(query_start), self._tensor((starts + counts).astype(np.int32))
        metadata = tuple(
            self._metadata(block_table(tables), sequence_of, positions, *shared) for tables in batch.block_tables
        )
        token_ids = np.array(batch.token_ids, dtype=np.int64)
        step = self._tensor(token_ids), self._tensor(positions), metadata, self.cache.pools
        if not _wants_routing(batch):
            return self.decoder.forward(*step), None
        heard: list[torch.Tensor] = []  # [T, E] a layer
        hidden = self.decoder.forward(
            *step, router_listener=lambda _, logits: heard.append(logits.float().softmax(dim=-1))
        )
        return hidden, torch.cat(heard, dim=1)

    def logits(self, hidden: torch.Tensor, batch: StepBatch) -> tuple[torch.Tensor, list[int]]:
        """Logits [N, V] of each sequence that draws, and for every draw its row among them."""
        if not batch.draws:
            return hidden.new_empty((0, self.decoder.vocab_size), dtype=torch.float32), []
        ends = np.cumsum(np.array(batch.counts, dtype=np.int64)) - 1
        rows, row_of = np.unique(np.array(batch.draw_rows, dtype=np.int64), return_inverse=True)
        return self.decoder.logits(hidden[self._tensor(ends[rows])]), row_of.tolist()

    def _metadata(
        self,
        table: Int32s,
        sequence_of: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        query_start: torch.Tensor,
        context_lens: torch.Tensor,
    ) -> AttentionMetadata:
        width = self.cache.block_tokens
        slots = table[sequence_of, positions // width].astype(np.int64) * width + positions % width
        return AttentionMetadata(
            query_start=query_start,
            context_lens=context_lens,
            block_table=self._tensor(table),
            slots=self._tensor(slots),
        )

    def _tensor(self, values: npt.NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(values).to(self.decoder.device, non_blocking=True)


def _wants_routing(batch: StepBatch) -> bool:
    wanted = (batch.sequences[row].request.vector for row in batch.pooled_rows)
    return any(vector is not None and vector.form.routing_weight for vector in wanted)


def block_table(tables: list[array[int]]) -> Int32s:
    """Tables of different lengths -> int32 [S, B], filled up with -1; no Python loop over blocks."""
    lengths = np.fromiter(map(len, tables), dtype=np.int64, count=len(tables))
    width = int(lengths.max(initial=0))
    table = np.full((len(tables), width), -1, dtype=np.int32)
    table[np.arange(width) < lengths[:, None]] = np.frombuffer(b"".join(tables), dtype=np.int32)
    return table
