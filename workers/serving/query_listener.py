"""The side of an actor that answers queries over connections of its own, beside the calls that Ray brings it."""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import Final

from workers.serving.query_wire import KEY_BYTES, Door, Wire

MAX_CONNECTIONS: Final = 1024  # at once, each with a thread that mostly sleeps
_RETRY_S: Final = 0.1

log = logging.getLogger(__name__)


class QueryListener:
    """Listens on one address of this node, from now until the process ends, and answers who knows the key.

    A connection has one query under way at a time; `at_once` are answered side by side.
    """

    def __init__(self, host: str, answer: Callable[[bytes | bytearray], bytes], *, at_once: int) -> None:
        """OSError where `host` is no address of this machine's. `answer` does not raise."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=128)
        self.door = Door(host, int(self._listener.getsockname()[1]), secrets.token_bytes(KEY_BYTES))
        self._answer = answer
        self._turns = threading.Semaphore(at_once)
        self._places = threading.Semaphore(MAX_CONNECTIONS)
        threading.Thread(target=self._accept, name="accept", daemon=True).start()

    @staticmethod
    def open(host: str, answer: Callable[[bytes | bytearray], bytes], *, at_once: int) -> QueryListener | None:
        """None where this machine does not have the address that Ray knows it by: then Ray brings the queries."""
        try:
            return QueryListener(host, answer, at_once=at_once)
        except OSError as error:
            log.warning("no port for queries on %s (%s): they come through Ray, which takes longer", host, error)
            return None

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # too many open files, for one
                time.sleep(_RETRY_S)
                continue
            if not self._places.acquire(blocking=False):
                connection.close()
                continue
            try:
                threading.Thread(target=self._serve, args=(connection,), name="queries", daemon=True).start()
            except RuntimeError as error:  # the system gives no more threads for now
                log.warning("a connection is turned away: %s", error)
                connection.close()
                self._places.release()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, contextlib.suppress(OSError, MemoryError, OverflowError):  # or a length that can't be
                wire = Wire.of(connection, self.door.key)
                while True:
                    message = wire.receive()
                    with self._turns:
                        reply = self._answer(message)
                    wire.send(reply)
        finally:
            self._places.release()
