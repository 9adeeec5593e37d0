"""Whether Ray itself is still there: its head, and the node that this process is connected to.

Ray tells a driver nothing when either is gone. Its calls to the head block, and after a minute it ends the process
without a word of ours. So a thread knocks at both, and calls that need them are made where they may be given up.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from jobs.cluster.nodes import living_nodes, own_node_id
from pipeline.errors import JobError

LOOK_S = 0.5
REACH_S = 2.0  # for a connection to come about
OWN_S = 1.5  # of closed doors, until a Ray that was started for us is taken for lost: nobody starts it again
JOINED_S = 40.0  # somebody may restart a cluster's head; Ray itself ends this process after 60 seconds

_T = TypeVar("_T")


class RayLost(JobError):
    """Ray's head, or this process's node, is gone."""


class HeadWatch:
    """Knocks until `close`. `own`: the Ray was started for us and has no life without us."""

    def __init__(self, doors: Mapping[str, tuple[str, int]], *, own: bool) -> None:
        """`doors`: what is called how -> its host and port."""
        self._doors = doors
        self._own = own
        self._patience_s = OWN_S if own else JOINED_S
        self._closed_for: dict[str, tuple[float, float]] = {}  # since the first vain knock in a row, until the last
        self._ended = threading.Event()
        threading.Thread(target=self._watch, name="head-watch", daemon=True).start()

    @classmethod
    def of_connected_ray(cls, *, own: bool) -> HeadWatch:
        import ray

        host, _, port = str(ray.get_runtime_context().gcs_address).rpartition(":")
        doors = {"Ray's head": (host.strip("[]"), int(port))}
        for node in living_nodes():
            if node.id == own_node_id():
                doors["this node's raylet"] = (node.address, node.port)
        return cls(doors, own=own)

    def close(self) -> None:
        self._ended.set()

    def refuse_lost(self) -> None:
        """RayLost if it is, in a line that says what to do."""
        for name, (since, until) in list(self._closed_for.items()):
            if until - since > self._patience_s:
                host, port = self._doors[name]
                if self._own:
                    raise RayLost(
                        f"the Ray that was started for this job is gone ({name} at {host}:{port} takes no connection); "
                        "what is committed is kept: the same command goes on from there"
                    )
                raise RayLost(
                    f"{name} at {host}:{port} has taken no connection for {until - since:.0f} seconds; what is "
                    "committed is kept: when Ray is up again, the same command goes on from there"
                )

    def ask(self, call: Callable[[], _T]) -> _T:
        """What a call gives that needs Ray's head. RayLost if that is lost meanwhile; then the call is left alone."""
        self.refuse_lost()
        answer: list[Any] = []
        done = threading.Event()

        def run() -> None:
            try:
                answer.append((call(), None))
            except BaseException as error:
                answer.append((None, error))
            done.set()

        threading.Thread(target=run, name="ray-call", daemon=True).start()
        while not done.wait(LOOK_S):
            self.refuse_lost()
        result, error = answer[0]
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]

    def _watch(self) -> None:
        while not self._ended.wait(LOOK_S):
            for name, address in self._doors.items():
                try:
                    socket.create_connection(address, REACH_S).close()
                except OSError:
                    now = time.monotonic()
                    self._closed_for[name] = (self._closed_for.get(name, (now, now))[0], now)
                else:
                    self._closed_for.pop(name, None)
