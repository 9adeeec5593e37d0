"""Many requests through one decoder: continuous batching over a paged cache of keys and values."""

from typing import TYPE_CHECKING, Any

from workers.engine.request import SamplingParams

if TYPE_CHECKING:
    from workers.engine.engine import Engine

__all__ = ["Engine", "SamplingParams"]


def __getattr__(name: str) -> Any:
    # The engine brings torch; the scheduler, its tests and the job's side of a request need none.
    if name == "Engine":
        from workers.engine.engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
