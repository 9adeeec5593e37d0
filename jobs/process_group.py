"""Child processes that a signal to this process's group passes by.

A terminal's Ctrl-C, `timeout` and many a supervisor signal the whole group. A Ray that we started would die of it while
we still need it to stop cleanly; it ends with us anyway, since it asks the kernel to be killed when its parent dies.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_forking = threading.local()  # the child of a fork has its parent thread's


@contextmanager
def children_apart() -> Iterator[None]:
    """Within, each process that this thread forks is made a group of its own.

    Of those that `subprocess` starts only the ones with a `preexec_fn`, which all of Ray's have.
    """
    _forking.apart = True
    try:
        yield
    finally:
        _forking.apart = False


def _part() -> None:
    if getattr(_forking, "apart", False):
        os.setpgrp()


os.register_at_fork(after_in_child=_part)
