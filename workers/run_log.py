"""run.log in the job directory: what controller and workers have to tell a person who looks for a cause."""

from __future__ import annotations

import faulthandler
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RUN_LOG = "run.log"
LOGGERS = ("jobs", "workers", "pipeline")


@contextmanager
def run_log(out: Path, name: str) -> Iterator[None]:
    """Warnings and errors of our own packages are appended to the log, each line with the time and `name`."""
    handler = logging.FileHandler(out / RUN_LOG, delay=True)
    handler.setLevel(logging.INFO)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {name} %(levelname)s %(message)s"))
    loggers = [logging.getLogger(logger) for logger in LOGGERS]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate
        handler.close()


def log_crashes(out: Path) -> None:
    """A worker that a signal kills (a kernel that reads where it must not) leaves its stacks in the log."""
    file = (out / RUN_LOG).open("a")  # stays open as long as the process
    faulthandler.enable(file)
