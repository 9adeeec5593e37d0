"""Gangs of real processes, without Ray, each rank runs `gang_ranks.py`; and made-up routing for the planner."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from workers.parallel.group import Rendezvous
from workers.parallel.placement import Placement

Choices = list[NDArray[np.int64]]
FORKS = multiprocessing.get_context("forkserver")  # which imports torch once for all of them


class Ranks:
    """The processes of one gang. `results` waits for them and gives what each answered; None for one that died."""

    def __init__(
        self, folder: Path, task: dict[str, Any], placement: Placement | None, name: str, nodes: Sequence[str]
    ) -> None:
        from gang_ranks import run

        self.folder = folder
        folder.mkdir()
        self._rendezvous = None if placement is None else Rendezvous("127.0.0.1")
        seats: list[Any] = [None]
        if placement is not None and self._rendezvous is not None:
            seats = [*self._rendezvous.seats(name, nodes, placement.to_json())]
        self.processes = [
            FORKS.Process(target=run, args=(task | {"out": str(folder)}, seat, str(folder / f"{rank}.pickle")))
            for rank, seat in enumerate(seats)
        ]
        for process in self.processes:
            process.start()

    def results(self, timeout_s: float = 60.0) -> list[Any]:
        for process in self.processes:
            process.join(timeout_s)
            assert process.exitcode is not None, "it does not end"
        files = [self.folder / f"{rank}.pickle" for rank in range(len(self.processes))]
        return [pickle.loads(file.read_bytes()) if file.exists() else None for file in files]

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        if self._rendezvous is not None:
            self._rendezvous.close()


@pytest.fixture
def gang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Ranks]]:
    """`gang(task, placement)` starts its ranks; `gang(task, None)` one process without a gang."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    FORKS.set_forkserver_preload(["workers.gang_engine", "workers.engine_factory"])
    begun: list[Ranks] = []

    def begin(
        task: dict[str, Any],
        placement: Placement | None,
        name: str = "worker-0.0",
        nodes: Sequence[str] | None = None,  # that the ranks are told they are on; None: all on one
    ) -> Ranks:
        if nodes is None:
            nodes = ["one"] * (1 if placement is None else placement.num_ranks)
        begun.append(Ranks(tmp_path / f"gang-{len(begun)}", task, placement, name, nodes))
        return begun[-1]

    yield begin
    for ranks in begun:
        ranks.end()


@pytest.fixture(scope="session")
def domain_choices() -> Callable[..., Choices]:
    """[T, k] choices a layer; a token's domain, one of `domains`, makes its own experts likelier."""

    def make(*, layers: int, experts: int, top_k: int, tokens: int, domains: int, seed: int = 0) -> Choices:
        rng = np.random.default_rng(seed)
        choices = []
        for _ in range(layers):
            domain_of = rng.permutation(experts) % domains
            scores = np.log(1 + rng.pareto(1.5, experts)) + rng.gumbel(size=(tokens, experts))
            scores += 3.0 * (domain_of == rng.integers(domains, size=tokens)[:, None])
            choices.append(np.sort(np.argsort(-scores, axis=1)[:, :top_k], axis=1))
        return choices

    return make
