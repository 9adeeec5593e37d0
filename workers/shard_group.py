"""The shards of one index as one: searched side by side, watched, and asked again where one was replaced.

A process that died is known of at once, and Ray starts another in its place, which loads the same file. One that is
stopped or cut off is known by its silence, and ended so that it is replaced too. What it was asked is asked once more
of its replacement, and fails with a line that says so if that is not ready within seconds.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, NoReturn, cast

import numpy as np
import numpy.typing as npt
import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RayActorError, RayError, RayTaskError

from pipeline.errors import JobError, UserError
from workers.index_shard import Found, Phase

REPLACING_S: Final = 10.0  # that a query waits for the replacement of what died under it
SILENCE_S: Final = 5.0  # of an actor, until it is taken for stopped or cut off
STARTING_S: Final = 600.0  # of silence, while a process comes up and reads what it needs
PLACING_S: Final = 120.0  # for Ray to find room for an actor
LOOK_S: Final = 0.5  # between two looks at each
_POLL_S: Final = 0.05
_SHARED_BYTES: Final = 1 << 16  # queries larger than this are put where all shards of a node read them


class ShardGroup:
    """`shards` are IndexShardActors, by number. May be used by several threads at once.

    `patience_s` is how long a search waits for the replacement of a shard that died under it.
    """

    def __init__(self, shards: Sequence[Any], *, patience_s: float = REPLACING_S) -> None:
        self._shards = list(shards)
        self._patience_s = patience_s

    def search(self, queries: npt.NDArray[np.float32], k: int, allowed: Sequence[Any] | None = None) -> list[Found]:
        """Each shard's answer, to be merged by `best`, among the vectors `allowed` of each shard, or among all.

        `allowed` are masks, or what `put_masks` made of them.

        JobError where one has none within seconds.
        """
        sent: Any = ray.put(queries) if queries.nbytes > _SHARED_BYTES and len(self._shards) > 1 else queries
        masks = [None] * len(self._shards) if allowed is None else allowed
        asked = [shard.search.remote(sent, k, mask) for shard, mask in zip(self._shards, masks, strict=True)]
        return [self._answer(number, asked[number], sent, k, masks[number]) for number in range(len(asked))]

    def _answer(self, number: int, reference: Any, queries: Any, k: int, allowed: Any) -> Found:
        shard = self._shards[number]
        send = partial(shard.search.remote, queries, k, allowed)
        return cast(Found, answer_of(shard, f"shard {number}", send, reference, patience_s=self._patience_s))


def put_masks(masks: Sequence[npt.NDArray[np.bool_]]) -> list[Any]:
    """Masks of shards that are searched again and again: sent once."""
    return [ray.put(mask) for mask in masks]


def answer_of(
    actor: Any, what: str, send: Callable[[], Any], reference: Any = None, *, patience_s: float = REPLACING_S
) -> Any:
    """What `actor` says to what `send` asks, which `reference`, if given, was already; by a replacement if it dies.

    JobError where it has no answer within `patience_s`.
    """
    try:
        return get(send() if reference is None else reference)
    except RayActorError as error:
        await_replacement(actor, what, error, patience_s)
    try:
        return get(send())
    except RayActorError as error:
        raise JobError(f"{what} died twice while it was asked ({one_line(error)})") from error


def get(reference: Any, timeout_s: float | None = None) -> Any:
    """What an actor answered. Its UserError and JobError are raised as they were there."""
    try:
        return ray.get(reference, timeout=timeout_s)
    except RayTaskError as error:
        raise_cause(error)


def raise_cause(error: RayTaskError) -> NoReturn:
    cause = error.cause
    if isinstance(cause, UserError | JobError | RayError):
        raise cause from None
    raise JobError(f"a worker failed: {type(cause).__name__}: {' '.join(str(cause).split())[:300]}") from error


def await_replacement(actor: Any, what: str, error: RayActorError, patience_s: float) -> None:
    """Returns when the actor that died with `error` is there again. JobError if it is not within `patience_s`."""
    deadline = time.monotonic() + patience_s
    while True:
        if isinstance(error, ActorDiedError):  # for good: with the process that it belongs to, or as it was told to
            raise JobError(f"{what} is gone: the process that served it has ended ({one_line(error)})") from None
        left = deadline - time.monotonic()
        if left <= 0:
            raise JobError(
                f"{what} died and its replacement was not ready within {patience_s:.0f} seconds; ask again in a moment"
            ) from None
        try:
            phase, _ = ping(actor, left)
        except GetTimeoutError:
            continue
        except RayActorError as again:
            error = again
            time.sleep(_POLL_S)
            continue
        if phase != "loading":
            return
        time.sleep(_POLL_S)


def ping(actor: Any, timeout_s: float) -> tuple[Phase, str]:
    """RayActorError while it is dead or being replaced, GetTimeoutError where it says nothing."""
    answer = actor.ping.options(concurrency_group="health").remote()
    return cast(tuple[Phase, str], get(answer, timeout_s))


def await_ready(actors: Mapping[str, Any], *, user_errors: Sequence[str] = ()) -> None:
    """Until each is ready. JobError, with the reason, where one can't be; UserError for those in `user_errors`."""
    deadline = time.monotonic() + PLACING_S
    for what, actor in actors.items():
        while True:
            try:
                phase, failure = ping(actor, max(deadline - time.monotonic(), 1.0))
            except GetTimeoutError:
                raise JobError(f"{what} found no room in the cluster for {PLACING_S:.0f} seconds") from None
            except RayActorError as error:
                raise JobError(f"{what} died while it was started ({one_line(error)})") from error
            if phase == "ready":
                break
            if phase == "failed":
                raise (UserError if what in user_errors else JobError)(failure)
            deadline = max(deadline, time.monotonic() + STARTING_S)
            time.sleep(_POLL_S)


def end_actors(actors: Sequence[Any]) -> None:
    for actor in actors:
        ray.kill(actor)


class Watch:
    """Looks at actors twice a second, in a thread, and ends those that are silent: Ray then replaces them."""

    def __init__(self, actors: Sequence[Any]) -> None:
        self._actors = list(actors)
        self._is_ready = [False] * len(self._actors)
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
                phase, _ = ray.get(reference)
                self._is_ready[number] = phase == "ready"
            except RayError:
                self._is_ready[number] = False
        self._asked[number] = (actor.ping.options(concurrency_group="health").remote(), now)


def one_line(error: Exception) -> str:
    """Ray's reason for a death, without the page around it."""
    text = " ".join(str(error).split())
    for mark in ("Worker exit detail: ", "reason: ", "because: "):
        if mark in text:
            text = text[text.index(mark) + len(mark) :]
            break
    return text[:200]
