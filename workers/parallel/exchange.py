"""The dispatcher for experts that lie on several ranks: rows travel to their experts and answers travel back.

T tokens of this rank, k experts a token, N = T * k pairs of token and expert, A rows that arrive here, C columns,
R ranks, E experts, M copies of an expert at most, S slots of all ranks together, numbered rank by rank. Three exchanges
a layer: counts, rows, answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Protocol

import torch
from torch import Tensor

from workers.parallel.copies import copies_of, turns
from workers.parallel.dispatch import Compute, Dispatcher, combine
from workers.parallel.expert_work import ExpertWork, by_expert
from workers.parallel.placement import Placement, Topology


class Exchange(Protocol):
    """What a dispatcher needs of its gang; `workers.parallel.group.Gang` is one."""

    rank: int
    num_ranks: int

    def exchange(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class _Layer:
    slots: list[int]  # [R] how many each rank has
    copies: Tensor  # [E, M] the slots that hold an expert, filled up with the first
    bounds: Tensor  # [E, M] between the turns at which this rank asks one copy and the next: `Copies.bounds`


@dataclass(slots=True)
class Traffic:
    """What one rank's dispatcher did so far."""

    exchanges: int = 0
    tokens: int = 0  # own tokens, once a layer
    row_bytes: int = 0  # of one hidden state
    bytes_to: list[int] = field(default_factory=list)  # [R] of rows for its experts, and of answers to its rows
    rows: dict[int, Tensor] = field(default_factory=dict)  # by layer, [own slots] rows computed in each slot
    seconds: float = 0.0  # within exchanges: moving data, and waiting for slower ranks


class AllToAllDispatcher(Dispatcher):
    """Experts lie where `placement` says. Every rank of the gang must run the same layers in the same order.

    An expert that several ranks hold is asked at each in turn, by token, and on this rank's own node as often as leaves
    all copies with as much to do. Answers are combined on the token's own rank in the order of its experts, so neither
    placement nor copies change a bit of the result.
    """

    def __init__(self, gang: Exchange, placement: Placement, topology: Topology) -> None:
        self._gang = gang
        self.topology = topology
        self.place(placement)

    def place(self, placement: Placement) -> None:
        """From the next step on experts lie so, on all ranks; `traffic` counts from here on."""
        gang = self._gang
        if placement.num_ranks != gang.num_ranks:
            raise ValueError(f"a placement over {placement.num_ranks} ranks for a gang of {gang.num_ranks}")
        self.placement = placement
        self._layers = {layer: _layer(placement, self.topology, layer, gang.rank) for layer in placement.layers}
        self.clear()

    def run(
        self, layer: int, num_experts: int, x: Tensor, expert_ids: Tensor, weights: Tensor, compute: Compute
    ) -> Tensor:
        top_k = expert_ids.shape[1]
        slots = self._slots(layer, num_experts, expert_ids)  # [N]
        by_slot = slots.argsort(stable=True)  # [N] pairs, those of a slot together
        leaving = slots.bincount(minlength=sum(self._layers[layer].slots))  # [S]
        arriving = self._counts(layer, leaving)  # [R, own slots]
        sent = [int(counts.sum()) for counts in torch.split(leaving.cpu(), self._layers[layer].slots)]
        received: list[int] = arriving.sum(dim=1).tolist()
        rows = self._exchange(x[by_slot // top_k], sent, received)  # [A, C], by sender and then by slot
        answers = self._exchange(_answers(rows, arriving, compute), received, sent)  # [N, C]
        self._note(layer, x, sent, received, arriving)
        by_pair = torch.empty_like(answers)
        by_pair[by_slot] = answers
        return combine(by_pair, weights)

    def clear(self) -> None:
        self.traffic = Traffic(bytes_to=[0] * self._gang.num_ranks)

    def work(self) -> ExpertWork:
        traffic, placement, rank = self.traffic, self.placement, self._gang.rank
        rows = {
            layer: by_expert(rows.numpy(), placement.held(layer, rank), placement.num_experts)
            for layer, rows in sorted(traffic.rows.copy().items())
        }
        return ExpertWork(rows=rows, bytes_to=tuple(traffic.bytes_to), row_bytes=traffic.row_bytes)

    def _slots(self, layer: int, num_experts: int, expert_ids: Tensor) -> Tensor:
        """expert_ids [T, k] -> the slot that each pair goes to, [N]."""
        table = self._layers[layer]
        assert table.copies.shape[0] == num_experts, (layer, table.copies.shape, num_experts)
        if table.copies.device != expert_ids.device:
            table = _Layer(table.slots, table.copies.to(expert_ids.device), table.bounds.to(expert_ids.device))
            self._layers[layer] = table
        if table.copies.shape[1] == 1:
            return table.copies[:, 0][expert_ids].flatten()
        turn = torch.from_numpy(turns(expert_ids.shape[0], self._gang.rank)).to(expert_ids.device)  # [T]
        which = (turn[:, None, None] >= table.bounds[expert_ids]).sum(dim=2)  # [T, k]
        return table.copies[expert_ids, which].flatten()

    def _counts(self, layer: int, leaving: Tensor) -> Tensor:
        """leaving [S] rows for each slot -> what each rank has for each slot here, [R, own slots], on CPU."""
        slots = self._layers[layer].slots
        own = slots[self._gang.rank]
        return self._exchange(leaving, slots, [own] * len(slots)).view(len(slots), own).cpu()

    def _exchange(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        begin = perf_counter()
        out = self._gang.exchange(rows, sent, received)
        self.traffic.exchanges += 1
        self.traffic.seconds += perf_counter() - begin
        return out

    def _note(self, layer: int, x: Tensor, sent: list[int], received: list[int], arriving: Tensor) -> None:
        traffic, row_bytes = self.traffic, x.shape[1] * x.element_size()
        traffic.tokens += x.shape[0]
        traffic.row_bytes = row_bytes
        for rank in range(len(sent)):
            if rank != self._gang.rank:
                traffic.bytes_to[rank] += (sent[rank] + received[rank]) * row_bytes
        computed = arriving.sum(dim=0)
        traffic.rows[layer] = traffic.rows[layer] + computed if layer in traffic.rows else computed


def _answers(rows: Tensor, arriving: Tensor, compute: Compute) -> Tensor:
    """rows [A, C] by sender and then by slot, arriving [R, own slots] of them -> each one's answer, in their order."""
    if not rows.shape[0]:
        return rows
    ranks, own = arriving.shape
    slot_of = torch.arange(own).repeat(ranks).repeat_interleave(arriving.flatten())  # [A]
    by_slot = slot_of.argsort(stable=True).to(rows.device)
    answers = torch.empty_like(rows)
    answers[by_slot] = compute(rows[by_slot], arriving.sum(dim=0))
    return answers


def _layer(placement: Placement, topology: Topology, layer: int, rank: int) -> _Layer:
    copies = copies_of(placement, topology, layer)
    return _Layer(
        [len(placement.held(layer, other)) for other in range(placement.num_ranks)],
        torch.from_numpy(copies.slots),
        torch.from_numpy(copies.bounds[topology.node_of[rank]]),
    )
