"""Asks one actor: over connections to its own port, or where that can't be reached, by Ray's calls.

A call of Ray's passes through several threads and an event loop on either side; a connection costs a tenth of it. Which
of the two it is, is settled once for each process that the actor has been, and `carrier` says it.

A process that died is known of at once, and Ray starts another in its place. One that is stopped or cut off is known by
its silence, and ended so that it is replaced too (`workers.serving.actor_watch`). What it was asked is asked once more
of its replacement, and fails with a line that says so if that is not ready within seconds.
"""

from __future__ import annotations

import logging
import threading
from typing import Any, Final, Literal, cast

from ray.exceptions import RayActorError

from pipeline.errors import JobError
from workers.serving.actor_calls import await_replacement, death_reason, get
from workers.serving.query_messages import Message, answer_in
from workers.serving.query_wire import Door, Wire

REPLACING_S: Final = 10.0  # that a query waits for the replacement of what died under it

Carrier = Literal["socket", "ray"]

log = logging.getLogger(__name__)


class QueryLine:
    """May be used by several threads at once: each query has a connection for itself, which stays for the next.

    The actor has `door()`, where it listens, and `answer(bytes)`, the same for Ray; `what` names it to people.
    """

    def __init__(self, actor: Any, what: str, *, patience_s: float = REPLACING_S) -> None:
        self.actor = actor
        self.what = what
        self._patience_s = patience_s
        self._lock = threading.Lock()  # of the free connections
        self._free: list[Wire] = []
        self._settling = threading.Lock()  # of what follows
        self._door: Door | None = None
        self._carrier: Carrier | None = None

    @property
    def carrier(self) -> Carrier:
        """JobError where the actor is gone, or not ready within seconds."""
        try:
            self._give_back(self._take())
        except (OSError, RayActorError) as error:
            self.await_replacement(error)
            try:
                self._give_back(self._take())
            except (OSError, RayActorError) as again:
                raise JobError(f"{self.what} can't be asked ({death_reason(again)})") from again
        assert self._carrier is not None
        return self._carrier

    def ask(self, request: Message) -> Message:
        """JobError where no answer comes within seconds, and whatever UserError or JobError is the answer."""
        call = self.send(request.to_bytes())
        try:
            return call.answer()
        finally:
            call.drop()

    def send(self, request: bytes) -> Call:
        """The query is on its way then; the answer is waited for later. `drop` what is not waited for."""
        return Call(self, request)

    def close(self) -> None:
        with self._lock:
            free, self._free = self._free, []
        for wire in free:
            wire.close()

    def await_replacement(self, error: Exception) -> None:
        """JobError if the actor, which was lost with `error`, is not there again within seconds."""
        self.close()
        with self._settling:
            self._door = self._carrier = None
        await_replacement(self.actor, self.what, error, self._patience_s)

    def _take(self) -> Wire | None:
        """A connection of one's own, or None: by Ray. RayActorError where the actor is dead, OSError as it dies."""
        with self._lock:
            if self._free:
                return self._free.pop()
        with self._settling:
            carrier, door = self._carrier, self._door
            if carrier is None:
                return self._settle()
        return None if carrier == "ray" or door is None else Wire.to(door)

    def _settle(self) -> Wire | None:
        """As `_take`. Others who ask wait meanwhile, so that none takes a port that nobody reaches for a death."""
        door = cast(Door | None, self._ask_door())
        wire = None
        if door is not None:
            try:
                wire = Wire.to(door)
            except OSError as error:
                self._ask_door()  # if it has died, that is why
                log.warning(
                    "%s can't be reached at %s:%d (%s): asking through Ray, which takes longer",
                    self.what,
                    door.host,
                    door.port,
                    error,
                )
        self._door, self._carrier = door, "ray" if wire is None else "socket"
        return wire

    def _ask_door(self) -> Any:
        return get(self.actor.door.options(concurrency_group="health").remote())

    def _give_back(self, wire: Wire | None) -> None:
        if wire is not None:
            with self._lock:
                self._free.append(wire)


class Call:
    """A query under way."""

    def __init__(self, line: QueryLine, request: bytes) -> None:
        self._line = line
        self._request = request
        self._wire: Wire | None = None
        self._reference: Any = None
        self._failure: Exception | None = None
        try:
            self._send()
        except (OSError, RayActorError) as error:
            self._failure = error

    def answer(self) -> Message:
        """As `QueryLine.ask`. To be called once."""
        try:
            if self._failure is not None:
                raise self._failure
            reply = self._receive()
        except (OSError, RayActorError) as error:
            self.drop()
            self._line.await_replacement(error)
            try:
                self._send()
                reply = self._receive()
            except (OSError, RayActorError) as again:
                raise JobError(f"{self._line.what} died twice while it was asked ({death_reason(again)})") from again
        return answer_in(reply)

    def drop(self) -> None:
        """Ends the connection if its answer was not waited for, so that nobody takes it for another's."""
        if self._wire is not None:
            self._wire.close()
            self._wire = None

    def _send(self) -> None:
        self._wire = self._line._take()
        if self._wire is not None:
            self._wire.send(self._request)
        else:
            self._reference = self._line.actor.answer.remote(self._request)

    def _receive(self) -> bytes | bytearray:
        if self._wire is None:
            return cast(bytes, get(self._reference))
        reply = self._wire.receive()
        wire, self._wire = self._wire, None
        self._line._give_back(wire)
        return reply
