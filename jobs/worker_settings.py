"""A job -> what its shards are told. The one place where a JobSpec becomes the workers' terms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from jobs.embedding import embedding_forms
from jobs.experts.calibration_sample import calibration_sample
from jobs.spec import EmbedSpec, JobSpec, PromptSpec
from jobs.store import JobStore
from pipeline.prompts import Example, PromptSettings
from workers.settings import EmbedSettings, EngineSettings, JobSettings, ShardSettings


def worker_settings(store: JobStore, engine_factory: str, *, rows_to_do: int) -> ShardSettings:
    """`device` and `threads` are settled when the cluster is known, by `Fleet`. `rows_to_do` in this run."""
    job = store.job
    spec = job.spec
    columns = spec.output.columns
    assert columns != "auto"
    return ShardSettings(
        engine=replace(engine_settings(spec, job.model_path.absolute()), factory=engine_factory),
        job=JobSettings(
            out=str(store.folder.root),
            source=job.source.to_json(),
            prompt=prompt_settings(spec.prompt),
            on_too_long=spec.prompt.on_too_long,
            date=store.date,
            sampling=spec.generate.model_dump() if spec.generate else None,
            embed=embed_settings(spec.embed) if spec.embed else None,
            carried=columns,
            id_column=spec.input.id,
            calibration=calibration_sample(job.splits, spec.cluster.calibration_rows, rows_to_do=rows_to_do),
        ),
    )


def engine_settings(spec: JobSpec, model_path: Path) -> EngineSettings:
    return EngineSettings(
        model_path=str(model_path),
        device=spec.cluster.device,
        dtype=spec.cluster.dtype,
        kv_cache_bytes=_number(spec.engine.kv_cache_bytes),
        max_context=_number(spec.engine.max_context),
        step_tokens=_number(spec.engine.step_tokens),
        max_sequences=_number(spec.engine.max_sequences),
        attention=spec.attention_rules,
    )


def prompt_settings(prompt: PromptSpec) -> PromptSettings:
    return PromptSettings(
        column=prompt.column,
        template=prompt.template,
        chat=prompt.chat,
        system=prompt.system,
        examples=tuple(Example(user=one.user, assistant=one.assistant) for one in prompt.examples),
    )


def embed_settings(embed: EmbedSpec) -> EmbedSettings:
    """Of a settled job."""
    vector, text = embedding_forms(embed)
    return EmbedSettings(of=embed.of, template=embed.template, form=vector, text=text)


def _number(setting: int | Literal["auto"]) -> int | None:
    return None if setting == "auto" else setting
