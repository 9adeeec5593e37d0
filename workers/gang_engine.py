"""One rank's engine in lock-step with its gang's: every rank steps as often as the others, with or without work.

Before each step the ranks tell each other, in one small exchange, whether they have work, whether they want to stop,
and how many requests wait. A rank at which nothing waits is lent some that wait elsewhere (`sharing.py`), and its
answers go back with a later such meeting; so whoever added a request gets its answer, wherever it ran. An answer
doesn't depend on where, since it is a function of the request alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

from workers.decoder.checkpoint import Checkpoint
from workers.engine import Engine
from workers.engine.request import EmbedRequest, Finished, GenerateRequest
from workers.engine.stats import EngineStats
from workers.parallel.calibration import ChoiceListener, listening
from workers.parallel.exchange import AllToAllDispatcher
from workers.parallel.group import Gang
from workers.parallel.placement import Placement, Topology
from workers.parallel.sharing import share_out

Request = GenerateRequest | EmbedRequest


@dataclass(slots=True, kw_only=True)
class GangStats(EngineStats):
    """One rank's. `exchange_s` is also part of the seconds of the decoder, in which the exchanges are."""

    meetings: int = 0
    lent_requests: int = 0
    exchanges: int = 0
    exchange_s: float = 0.0  # moving rows and waiting for slower ranks
    exchanged_bytes: int = 0  # hidden states that went to other ranks
    expert_rows: int = 0  # computed by this rank's experts, its own and others'


class GangEngine:
    """A `flights.ShardEngine` and its `LockStep`. `agree` and `step` are called in turns, by one thread.

    Callers number their requests from 0; negative ids are borrowed requests' own.
    """

    def __init__(self, engine: Engine, gang: Gang, dispatcher: AllToAllDispatcher) -> None:
        self._engine = engine
        self._gang = gang
        self._dispatcher = dispatcher
        self._works = False  # somebody in the gang had work when it met last
        self._lent: set[int] = set()  # whose answers are still wanted
        self._borrowed: dict[int, tuple[int, int]] = {}  # own id -> the lender and its id
        self._next_borrowed = -1
        self._leaving: list[list[Finished]] = [[] for _ in range(gang.num_ranks)]  # answers to lenders
        self._returned: list[Finished] = []  # answers from borrowers, for the next `step` to hand on
        self._meetings = self._num_lent = 0

    def add(self, request: Request) -> None:
        assert request.request_id >= 0, request.request_id
        self._engine.add(request)

    def abort(self, request_id: int) -> None:
        """Also where it is lent: then its answer is thrown away when it comes."""
        self._lent.discard(request_id)
        self._returned = [finished for finished in self._returned if finished.request_id != request_id]
        self._engine.abort(request_id)

    @property
    def has_work(self) -> bool:
        """Whether `step` must be called before the gang meets again."""
        return self._works or bool(self._returned)

    @property
    def is_idle(self) -> bool:
        waiting = self._lent or self._borrowed or self._returned or any(self._leaving)
        return not waiting and not self._engine.has_work

    @property
    def num_waiting(self) -> int:
        return self._engine.num_waiting

    @property
    def stats(self) -> GangStats:
        traffic, own = self._dispatcher.traffic, self._engine.stats
        return GangStats(
            **{field.name: getattr(own, field.name) for field in fields(own)},
            meetings=self._meetings,
            lent_requests=self._num_lent,
            exchanges=traffic.exchanges,
            exchange_s=traffic.seconds,
            exchanged_bytes=sum(traffic.bytes_to),
            expert_rows=sum(int(rows.sum()) for rows in list(traffic.rows.values())),
        )

    def agree(self, *, stopping: bool) -> bool:
        """Meet the gang, before each turn. -> whether all ranks stop now, since one of them wants to."""
        engine = self._engine
        leaving = sum(map(len, self._leaving))
        own = (stopping, engine.has_work, engine.num_waiting, engine.num_running, leaving)
        told = self._gang.tell([int(value) for value in own])
        self._meetings += 1
        if any(stops for stops, *_ in told):
            return True
        if any(answers for *_, answers in told):
            self._return_answers()
        moves = share_out([waiting for _, _, waiting, _, _ in told], [running for _, _, _, running, _ in told])
        if moves:
            gifts: list[list[Request]] = [[] for _ in told]
            for move in moves:
                if move.source == self._gang.rank:
                    gifts[move.target] = self._give(move.requests)
            self._borrow(self._gang.swap(gifts))
        self._works = any(works for _, works, *_ in told)
        return False

    def step(self) -> Sequence[Finished]:
        """A step if anybody in the gang has work, and the answers to this rank's own requests."""
        finished = self._engine.step() if self._works else []
        own, self._returned = self._returned, []
        for answer in finished:
            if answer.request_id >= 0:
                own.append(answer)
            else:
                lender, request_id = self._borrowed[answer.request_id]
                self._leaving[lender].append(replace(answer, request_id=request_id))
        for borrowed in {answer.request_id for answer in finished if answer.request_id < 0}:
            del self._borrowed[borrowed]
        return own

    def run_out(self) -> None:
        """Meet and step until nobody in the gang has work, and forget the answers: all ranks call it, or none."""
        while not self.agree(stopping=False) and self._works:
            self.step()
        self._returned.clear()

    @contextmanager
    def listening(self, listener: ChoiceListener) -> Iterator[None]:
        """Tell the listener what routers choose for the tokens that run here."""
        with listening(self._engine.decoder, listener):
            yield

    def move_experts(self, checkpoint: Checkpoint, placement: Placement) -> None:
        """Hold what `placement` gives this rank, read from the checkpoint, instead of what it has: all ranks, or none.

        What was counted until then is forgotten.
        """
        decoder = self._engine.decoder
        decoder.hold(checkpoint, placement.held_by(self._gang.rank, len(decoder.config.layers)))
        self._dispatcher.place(placement)
        self.clear_stats()

    def clear_stats(self) -> None:
        """Count from here on."""
        self._engine.clear_stats()
        self._meetings = self._num_lent = 0

    @property
    def gang(self) -> Gang:
        return self._gang

    @property
    def placement(self) -> Placement:
        return self._dispatcher.placement

    @property
    def topology(self) -> Topology:
        return self._dispatcher.topology

    def _return_answers(self) -> None:
        leaving, self._leaving = self._leaving, [[] for _ in self._leaving]
        for answers in self._gang.swap(leaving):
            self._returned += [answer for answer in answers if answer.request_id in self._lent]
        self._lent -= {answer.request_id for answer in self._returned}

    def _give(self, count: int) -> list[Request]:
        """Own requests that have not begun. Borrowed ones stay: their way back leads through here."""
        given = []
        for request in self._engine.withdraw(count):
            if request.request_id < 0:
                self._engine.add(request)
            else:
                self._lent.add(request.request_id)
                given.append(request)
        self._num_lent += len(given)
        return given

    def _borrow(self, gifts: Sequence[Sequence[Request]]) -> None:
        for lender, requests in enumerate(gifts):
            for request in requests:
                self._borrowed[self._next_borrowed] = (lender, request.request_id)
                self._engine.add(replace(request, request_id=self._next_borrowed))
                self._next_borrowed -= 1
