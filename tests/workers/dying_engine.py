"""The real engine, for a gang whose second rank dies the first time that it calibrates."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from workers.engine_factory import LoadedEngine, load_engine
from workers.settings import EngineSettings


def load(settings: EngineSettings) -> LoadedEngine:
    loaded = load_engine(settings)
    died = Path(settings.model_path) / "died"
    if settings.seat is not None and settings.seat.rank == 1 and not died.exists():

        def die() -> None:
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)

        loaded.engine.run_out = die
    return loaded
