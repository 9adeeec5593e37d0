"""Ray, started for this job alone or joined where it runs, and quiet: nothing of it reaches stdout."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import workers
from pipeline.errors import JobError, UserError

OBJECT_STORE_BYTES = 128 << 20  # only reports and orders travel through it


@contextmanager
def ray_session(address: str | None, *, num_cpus: int) -> Iterator[None]:
    """Within, `ray` is connected. `address` None: RAY_ADDRESS, and without that a Ray of our own that ends with us.

    If Ray is connected already (a caller's own session), that is used and left as it is.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    logging.getLogger("ray").setLevel(logging.ERROR)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        if address:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            with _environment(
                PYTHONPATH=_tree_first(os.environ.get("PYTHONPATH")),
                RAY_USAGE_STATS_ENABLED="0",
                RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
                RAY_worker_niceness="0",  # Ray's 15 lets whatever else the machine does starve the decoder
            ):
                ray.init(
                    address="local",
                    num_cpus=num_cpus,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    object_store_memory=OBJECT_STORE_BYTES,
                )
    except (ConnectionError, ValueError) as error:
        where = f"cluster.address {address}" if address else "starting Ray"
        raise UserError(f"{where}: {' '.join(str(error).split())}") from error
    except Exception as error:
        where = f"joining Ray at {address}" if address else "starting Ray"
        raise JobError(f"{where} failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # ray.init took it
    try:
        yield
    finally:
        ray.shutdown()


def cluster_totals() -> dict[str, float]:
    """What all nodes of the connected Ray have together."""
    import ray

    return cast(dict[str, float], ray.cluster_resources())  # type: ignore[no-untyped-call]


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
def _environment(**settings: str) -> Iterator[None]:
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
