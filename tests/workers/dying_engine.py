"""The real engine, for gangs whose second rank dies while it calibrates: so often as the model's file `deaths` says."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from workers.engine_factory import LoadedEngine, load_engine
from workers.settings import EngineSettings


def load(settings: EngineSettings) -> LoadedEngine:
    loaded = load_engine(settings)
    if settings.seat is not None and settings.seat.rank == 1:
        run_out = loaded.engine.run_out

        def die() -> None:
            deaths = Path(settings.model_path) / "deaths"
            left = int(deaths.read_text())
            if left:
                deaths.write_text(str(left - 1))
                os.kill(os.getpid(), signal.SIGKILL)
            run_out()

        loaded.engine.run_out = die
    return loaded
