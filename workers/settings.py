"""What a shard is told when it begins. Plain values that travel: strings, numbers, JSON."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.embedding import TextForm, VectorForm
from pipeline.prompts import PromptSettings
from workers.parallel.seat import Seat

JsonObject = dict[str, Any]

DEFAULT_ENGINE = "workers.engine_factory:load_engine"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """None leaves a setting to the engine. `factory` is `module:callable`: EngineSettings -> the engine."""

    model_path: str
    factory: str = DEFAULT_ENGINE
    device: str = "cpu"
    dtype: str = "auto"
    threads: int = 1
    kv_cache_bytes: int | None = None
    max_context: int | None = None
    step_tokens: int | None = None
    max_sequences: int | None = None
    sharers: int = 1  # engines on the machine, which its memory is for
    seat: Seat | None = None  # in a gang of several ranks
    attention: tuple[JsonObject, ...] = ()  # AttentionRule's fields each; none: the model's own patterns


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedSettings:
    of: Literal["prompt", "generation", "both"]
    template: str | None = None  # over input columns, instead of the prompt's
    form: VectorForm = field(default_factory=VectorForm)  # settled: see embedding_choice
    text: TextForm = field(default_factory=TextForm)  # of passages


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplePlace:
    """The first `rows` rows of a split."""

    split: JsonObject  # pipeline.source.Split as JSON
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSettings:
    """The sample by which a gang places experts. `tokens_a_place`: no more at each; None: whatever there is."""

    places: tuple[SamplePlace, ...]
    tokens_a_place: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSettings:
    """A job, apart from the engine that it runs on.

    `sampling` holds SamplingParams' fields, None where the model decides; None: nothing is generated.
    `calibration`: for gangs whose seats say that they calibrate.
    """

    out: str  # the job directory
    source: JsonObject  # pipeline.source.Source as JSON
    prompt: PromptSettings
    on_too_long: Literal["error", "truncate"]
    date: str  # the job's, ISO 8601: what chat templates print
    sampling: JsonObject | None
    embed: EmbedSettings | None
    carried: tuple[str, ...] = ()
    id_column: str | None = None
    calibration: CalibrationSettings | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSettings:
    """What a shard loads, and the job that it runs first; others may follow on the same engine."""

    engine: EngineSettings
    job: JobSettings


def load_callable(path: str) -> Callable[..., Any]:
    """`module:callable` -> the callable."""
    module, _, name = path.partition(":")
    found = getattr(importlib.import_module(module), name)
    assert callable(found), path
    return found  # type: ignore[no-any-return]
