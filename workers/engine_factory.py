"""The engine that a shard drives, as its settings say. Another factory may stand in its place (`EngineSettings`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import JobError, UserError
from pipeline.tokenizer import Tokenizer
from workers.parallel.expert_work import ExpertWork
from workers.parallel.placement import Placement, Topology
from workers.parallel.seat import GangBroken
from workers.settings import EngineSettings

if TYPE_CHECKING:
    from workers.parallel.group import Gang


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedEngine:
    """What a factory returns. `engine` is a `flights.ShardEngine`; `max_context` counts prompt and generation.

    `lock_step`: the engine again, as a `row_runner.LockStep`, where it is one rank's of a gang. `expert_work`: what its
    experts did so far, for any thread; None of a dense model.
    """

    engine: Any
    tokenizer: Tokenizer
    max_context: int
    vector_width: int  # of hidden states
    router_width: int = 0  # the experts of all layers that have a router
    can_generate: bool = True
    lock_step: Any = None
    expert_work: Callable[[], ExpertWork] | None = None

    def refuse_generation(self, model: str) -> None:
        """UserError, for who wants to generate, where the model only embeds."""
        if not self.can_generate:
            raise UserError(
                f"model: {model} has no output matrix to generate with, its files hold the base model alone; embed "
                "with it, or name the whole checkpoint"
            )


def load_engine(settings: EngineSettings) -> LoadedEngine:
    """The real one. UserError for what is no model, or one that is not supported.

    With a seat in a gang only this rank's experts are loaded, and then the others are waited for: GangBroken if one of
    them dies meanwhile.
    """
    import torch

    from workers.decoder.checkpoint import load_checkpoint
    from workers.engine import Engine
    from workers.gang_engine import GangEngine
    from workers.parallel.exchange import AllToAllDispatcher
    from workers.parallel.group import Gang

    torch.set_num_threads(settings.threads)
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    seat, gang, dispatcher, experts = settings.seat, None, None, None
    if seat is not None:
        gang = Gang(seat, torch.device(device))
        placement = Placement.from_json(seat.placement)
        dispatcher = AllToAllDispatcher(gang, placement, Topology.of(seat.nodes))
        experts = placement.held_by(seat.rank, len(load_checkpoint(Path(settings.model_path)).config.layers))
    engine = Engine.from_checkpoint(
        settings.model_path,
        device=device,
        dtype=settings.dtype,
        kv_cache_bytes=settings.kv_cache_bytes or "auto",
        max_context=settings.max_context or "auto",
        step_tokens=settings.step_tokens or "auto",
        max_sequences=settings.max_sequences or "auto",
        sharers=settings.sharers,
        experts=experts,
        dispatcher=dispatcher,
        attention=settings.attention,
    )
    if engine.tokenizer is None:
        raise UserError(f"model: {settings.model_path} has no tokenizer, and a job's rows are text")
    lock_step = None
    if gang is not None and dispatcher is not None:
        _meet(gang)
        lock_step = GangEngine(engine, gang, dispatcher)
    return LoadedEngine(
        engine=lock_step or engine,
        tokenizer=engine.tokenizer,
        max_context=engine.max_context,
        vector_width=engine.decoder.hidden_width,
        lock_step=lock_step,
        router_width=engine.decoder.router_width,
        can_generate=engine.decoder.config.has_output,
        expert_work=(lambda: engine.decoder.dispatcher.work()) if engine.decoder.router_width else None,
    )


def _meet(gang: Gang) -> None:
    try:
        gang.form()
    except JobError:
        raise
    except Exception as error:  # who is still there hears of it from torch, in many words
        raise GangBroken(f"while the gang met: {type(error).__name__}: {error}") from error
