"""The engine that a shard drives, as its settings say. Another factory may stand in its place (`EngineSettings`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.errors import UserError
from pipeline.tokenizer import Tokenizer
from workers.settings import EngineSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedEngine:
    """What a factory returns. `engine` is a `row_runner.ShardEngine`; `max_context` counts prompt and generation."""

    engine: Any
    tokenizer: Tokenizer
    max_context: int
    vector_width: int  # of hidden states
    router_width: int = 0  # the experts of all layers that have a router


def load_engine(settings: EngineSettings) -> LoadedEngine:
    """The real one. UserError for what is no model, or one that is not supported."""
    import torch

    from workers.engine import Engine

    torch.set_num_threads(settings.threads)
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    engine = Engine.from_checkpoint(
        settings.model_path,
        device=device,
        dtype=settings.dtype,
        kv_cache_bytes=settings.kv_cache_bytes or "auto",
        max_context=settings.max_context or "auto",
        step_tokens=settings.step_tokens or "auto",
        max_sequences=settings.max_sequences or "auto",
    )
    if engine.tokenizer is None:
        raise UserError(f"model: {settings.model_path} has no tokenizer, and a job's rows are text")
    return LoadedEngine(
        engine=engine,
        tokenizer=engine.tokenizer,
        max_context=engine.max_context,
        vector_width=engine.decoder.hidden_width,
        router_width=engine.decoder.router_width,
    )
