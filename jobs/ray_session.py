"""Ray, started for this job alone or joined where it runs, and quiet: nothing of it reaches stdout."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import workers
from jobs.process_group import children_apart
from pipeline.errors import JobError, UserError, one_line

OBJECT_STORE_BYTES = 128 << 20  # only reports and orders travel through it
UNNEEDED_STARTS = ("start_api_server", "start_monitor", "start_log_monitor")
NUM_STARTS = 2  # Ray gives a node 30 seconds to come up, which a machine at its limit does not always manage
REACH_S = 5.0  # for a Ray that is about to start to take connections
REACH_POLL_S = 0.2

log = logging.getLogger(__name__)


@contextmanager
def ray_session(address: str | None, *, num_cpus: int) -> Iterator[None]:
    """Within, `ray` is connected. `address` None: RAY_ADDRESS, and without that a Ray of our own that ends with us.

    If Ray is connected already (a caller's own session), that is used and left as it is.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    logging.getLogger("ray").setLevel(logging.ERROR)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        if address := address_of(address):
            _join(address)
        else:
            _start(num_cpus)
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # ray.init took it
    try:
        yield
    finally:
        ray.shutdown()


def _join(address: str) -> None:
    import ray
    from ray._private.authentication import authentication_token_setup as tokens

    if address.startswith(("http://", "https://")):
        raise UserError(
            f"cluster.address {address}: that is a dashboard, where jobs are submitted (gristmill submit); "
            "to join a Ray, name its own address, such as HEAD:6379, or auto"
        )
    if address != "auto":
        _await_door(address)
    try:
        # A Ray that was started where a token is, or by us, asks for it; ray.init takes it along only when told to.
        tokens.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError) as error:
        raise UserError(f"cluster.address {address}: {_told(error)}") from error
    except Exception as error:
        raise JobError(f"joining Ray at {address} failed: {_told(error)}") from error


def _await_door(address: str) -> None:
    """Returns when somebody listens at HOST:PORT. UserError where nobody does, which Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not (port.isdecimal() and 0 < int(port) < 1 << 16):
        raise UserError(f"cluster.address {address}: an address of Ray's head is HOST:PORT, such as HEAD:6379, or auto")
    deadline = time.monotonic() + REACH_S
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), REACH_S).close()
            return
        except (OSError, UnicodeError) as error:  # the latter of a name that can't be one
            if not isinstance(error, ConnectionRefusedError) or time.monotonic() > deadline:
                raise UserError(
                    f"cluster.address {address}: nobody answers there ({error}); is Ray's head up, and can its port be "
                    "reached from here?"
                ) from error
            time.sleep(REACH_POLL_S)


def _start(num_cpus: int) -> None:
    import ray

    settings = {
        "PYTHONPATH": _tree_first(os.environ.get("PYTHONPATH")),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_worker_niceness": "0",  # Ray's 15 lets whatever else the machine does starve the decoder
    }
    for attempt in range(NUM_STARTS):
        try:
            with _environment(settings), _few_processes(), children_apart():
                ray.init(
                    address="local",
                    num_cpus=num_cpus,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    object_store_memory=OBJECT_STORE_BYTES,
                )
            return
        except Exception as error:
            ray.shutdown()
            if attempt + 1 == NUM_STARTS:
                raise JobError(f"starting Ray failed: {_told(error)}") from error
            log.warning("Ray did not start, which is tried again: %s", _told(error))


@contextmanager
def _few_processes() -> Iterator[None]:
    """Within, `ray.init` starts a node without what only a cluster of many users needs.

    The API server (which runs without the dashboard too), the autoscaler's monitor and the forwarding of logs take as
    long to start as all else together. Ray has no setting for it; where its Node is another class, all are started.
    """
    from ray._private.node import Node

    def start_nothing(node: Node, **_: Any) -> None:
        return

    before = {name: vars(Node)[name] for name in UNNEEDED_STARTS if name in vars(Node)}
    for name in before:
        setattr(Node, name, start_nothing)
    try:
        yield
    finally:
        for name, start in before.items():
            setattr(Node, name, start)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


def is_joined(address: str | None) -> bool:
    """Whether `ray_session` would use a Ray that runs already."""
    import ray

    return bool(ray.is_initialized() or address_of(address))


def address_of(address: str | None) -> str | None:
    """What a job means that names no address, too."""
    return address or os.environ.get("RAY_ADDRESS") or None


def wait_for(references: list[Any], timeout_s: float) -> list[Any]:
    """Those that are ready, as soon as one is."""
    import ray

    ready, _ = ray.wait(references, num_returns=1, timeout=timeout_s)
    if ready:
        ready, _ = ray.wait(references, num_returns=len(references), timeout=0)
    return ready


def _tree_first(path: str | None) -> str:
    """Workers import the packages from where this process did."""
    assert workers.__file__ is not None
    tree = str(Path(workers.__file__).parent.parent)
    return os.pathsep.join([tree, *([path] if path else [])])


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Variables that the processes which Ray starts inherit; a person's own settings win, but for PYTHONPATH."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update({name: value for name, value in settings.items() if name == "PYTHONPATH" or before[name] is None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
