"""Watches actors: one that is stopped or cut off is known by its silence, and ended, so that Ray replaces it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import ray
from ray.exceptions import RayError

from workers.serving.actor_calls import STARTING_S, Phase

SILENCE_S: Final = 5.0  # of an actor, until it is taken for stopped or cut off
LOOK_S: Final = 0.5  # between two looks at each


class Watch:
    """Looks at actors twice a second, in a thread, and ends those that are silent: Ray then replaces them."""

    def __init__(
        self, actors: Sequence[Any], on_ping: Callable[[Phase, str], None] | None = None, *, num_ready: int = 0
    ) -> None:
        """`on_ping` hears, in the watch's thread, what an actor says of itself; the first `num_ready` are ready.

        Of others it is not known: they may be silent for as long as starting takes, until they have said so.
        """
        self._actors = list(actors)
        self._on_ping = on_ping
        self._is_ready = [number < num_ready for number in range(len(self._actors))]
        self._asked: list[tuple[Any, float] | None] = [None] * len(self._actors)  # the ping on its way, and since when
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        looked_at = time.monotonic()
        while not self._ended.wait(LOOK_S):
            now = time.monotonic()
            away_s, looked_at = max(now - looked_at - 2 * LOOK_S, 0.0), now  # then the silence may be ours
            for number in range(len(self._actors)):
                self._look(number, now, away_s)

    def _look(self, number: int, now: float, away_s: float) -> None:
        actor, asked = self._actors[number], self._asked[number]
        if asked is not None:
            reference, since = asked[0], asked[1] + away_s
            ready, _ = ray.wait([reference], timeout=0)
            if not ready:
                self._asked[number] = (reference, since)
                if now - since > (SILENCE_S if self._is_ready[number] else STARTING_S):
                    self._asked[number], self._is_ready[number] = None, False
                    ray.kill(actor, no_restart=False)
                return
            try:
                phase, words = ray.get(reference)
                self._is_ready[number] = phase == "ready"
                if self._on_ping is not None:
                    self._on_ping(phase, words)
            except RayError:
                self._is_ready[number] = False
        self._asked[number] = (actor.ping.options(concurrency_group="health").remote(), now)
