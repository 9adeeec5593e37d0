"""Calls of actors that may die and be replaced: answers, errors as they were raised there, and when one is ready."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, NoReturn, cast

import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RayActorError, RayError, RayTaskError

from pipeline.errors import JobError, UserError, one_line

Phase = Literal["loading", "ready", "failed"]

STARTING_S: Final = 600.0  # of silence, while a process comes up and reads what it needs
PLACING_S: Final = 120.0  # for Ray to find room for an actor
_POLL_S: Final = 0.05


def answer_of(actor: Any, what: str, send: Callable[[], Any], *, patience_s: float) -> Any:
    """What `actor` says to what `send` asks, or if it dies, what its replacement does.

    JobError where it has no answer within `patience_s`.
    """
    try:
        return get(send())
    except RayActorError as error:
        await_replacement(actor, what, error, patience_s)
    try:
        return get(send())
    except RayActorError as error:
        raise JobError(f"{what} died twice while it was asked ({death_reason(error)})") from error


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
    raise JobError(f"a worker failed: {type(cause).__name__}: {one_line(cause)}") from error


def await_replacement(actor: Any, what: str, error: Exception, patience_s: float) -> None:
    """Returns when the actor is there again, which was lost with `error`: RayActorError, or OSError of a connection.

    JobError if it is not within `patience_s`.
    """
    deadline = time.monotonic() + patience_s
    while True:
        if isinstance(error, ActorDiedError):  # for good: with the process that it belongs to, or as it was told to
            raise JobError(f"{what} is gone: the process that served it has ended ({death_reason(error)})") from None
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
                raise JobError(f"{what} died while it was started ({death_reason(error)})") from error
            if phase == "ready":
                break
            if phase == "failed":
                raise (UserError if what in user_errors else JobError)(failure)
            deadline = max(deadline, time.monotonic() + STARTING_S)
            time.sleep(_POLL_S)


def end_actors(actors: Sequence[Any]) -> None:
    for actor in actors:
        ray.kill(actor)


def death_reason(error: Exception) -> str:
    """Ray's reason for a death, without the page around it."""
    text = " ".join(str(error).split())
    for mark in ("Worker exit detail: ", "reason: ", "because: "):
        if mark in text:
            text = text[text.index(mark) + len(mark) :]
            break
    return text[:200]
