"""What can happen to a job at any moment: processes and nodes that are killed, stopped, or told to end."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil

KINDS = ("kill a shard", "stop a shard", "kill a node", "kill the controller", "end the controller")
WEIGHTS = (4, 3, 2, 1, 1)
END_S = 240.0


@dataclass(frozen=True, slots=True)
class Trouble:
    kind: str
    after_s: float  # since the one before
    chance: float  # which of those that it may happen to


def draw(seed: int, count: int, mean_s: float, kinds: tuple[str, ...] = KINDS) -> list[Trouble]:
    """At moments that know nothing of what the job does just then: start, load, work, or recover."""
    chance = random.Random(seed)
    weights = [WEIGHTS[KINDS.index(kind)] for kind in kinds]
    return [
        Trouble(chance.choices(kinds, weights)[0], chance.expovariate(1 / mean_s), chance.random())
        for _ in range(count)
    ]


class Troubled:
    """One job, run again whenever its controller was ended, until it is done."""

    def __init__(
        self, start: Callable[[], Any], nodes: Any, shards_of: Any, say: Callable[[str], None] = print
    ) -> None:
        self._start = start
        self._nodes = nodes
        self._shards_of = shards_of
        self._say = say
        self._running = start()
        self._began = time.monotonic()

    def endure(self, troubles: list[Trouble]) -> None:
        """Tells how many came before the job was done. AssertionError if it does not end by itself, or badly."""
        for number, trouble in enumerate(troubles):
            until = time.monotonic() + trouble.after_s
            while time.monotonic() < until and self._running.process.poll() is None:
                time.sleep(0.01)
            if self._running.process.poll() is not None:
                self._end(f"{number} of {len(troubles)} troubles")
                return
            self._strike(trouble)
        self._end("all troubles")

    def _strike(self, trouble: Trouble) -> None:
        if "controller" in trouble.kind:
            self._tell(trouble.kind)
            if trouble.kind == "kill the controller":
                self._running.process.kill()
                self._running.process.communicate()
            else:
                self._running.process.send_signal(signal.SIGTERM)
                status, _, stderr = self._running.end()
                # During its imports it dies of the signal; while it starts or joins Ray, Ray ends it with the number.
                assert status in (130, 0, -signal.SIGTERM, signal.SIGTERM), (status, stderr)
            self._running = self._start()
        elif trouble.kind == "kill a node":
            name = "ab"[int(2 * trouble.chance)]
            self._tell(f"{trouble.kind}: {name}")
            self._nodes.kill(name)
            time.sleep(2 * trouble.chance)
            self._nodes.mend()
        else:
            shards = list(self._shards())
            while not shards and self._running.process.poll() is None:  # then early in its life
                time.sleep(3 * trouble.chance)
                shards = list(self._shards())
            for shard in sorted(shards, key=lambda one: one.pid)[int(len(shards) * trouble.chance) :][:1]:
                with suppress(psutil.NoSuchProcess):
                    shard.send_signal(signal.SIGKILL if trouble.kind == "kill a shard" else signal.SIGSTOP)
                    self._tell(f"{trouble.kind}: {shard.pid}, one of {len(shards)}")

    def _shards(self) -> Iterator[psutil.Process]:
        for name in "ab":
            yield from self._shards_of(self._nodes.raylet(name))

    def _end(self, came: str) -> None:
        status, _, stderr = self._running.end(END_S)
        assert status == 0, (status, stderr)
        self._tell(f"done, after {came}")

    def _tell(self, what: str) -> None:
        self._say(f"{time.monotonic() - self._began:6.1f} s: {what}")
