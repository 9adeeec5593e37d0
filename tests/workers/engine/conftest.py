from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from workers.engine import Engine


@pytest.fixture(scope="session")
def tiny_engine(tiny_model: Callable[..., Path]) -> Callable[..., Engine]:
    """`tiny_engine("llama", kv_cache_bytes=..., **options)` -> an engine on the seeded random checkpoint."""

    def make(model_type: str = "llama", *, model: dict[str, Any] | None = None, **options: Any) -> Engine:
        path = tiny_model(model_type, **(model or {}))
        return Engine.from_checkpoint(path, **({"device": "cpu", "dtype": "float32"} | options))

    return make


@pytest.fixture(scope="session")
def block_bytes(tiny_engine: Callable[..., Engine]) -> int:
    """What one block costs in the tiny model, to state budgets in blocks."""
    engine = tiny_engine()
    return engine.decoder.block_bytes(0, engine.cache.block_tokens)


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """64 prompts of 1 to 90 tokens: some share a long beginning, some are equal, lengths fall on block borders too."""
    import random

    draw = random.Random(0)
    system = [draw.randrange(3, 603) for _ in range(50)]
    made = []
    for i in range(60):
        own = [draw.randrange(3, 603) for _ in range(draw.choice([1, 2, 5, 15, 16, 17, 31, 32, 33, 40]))]
        made.append(system + own if i % 3 == 0 else own)
    return [*made, system[:32], system[:32], system[:33], system]
