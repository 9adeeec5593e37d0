"""A job -> what its shards are told. The one place where a JobSpec becomes the workers' terms."""

from __future__ import annotations

from typing import Literal

from jobs.embedding import embedding_forms
from jobs.experts.calibration_sample import calibration_sample
from jobs.spec import EmbedSpec
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
        engine=EngineSettings(
            model_path=str(job.model_path.absolute()),
            factory=engine_factory,
            device=spec.cluster.device,
            dtype=spec.cluster.dtype,
            kv_cache_bytes=_number(spec.engine.kv_cache_bytes),
            max_context=_number(spec.engine.max_context),
            step_tokens=_number(spec.engine.step_tokens),
            max_sequences=_number(spec.engine.max_sequences),
            attention=spec.attention_rules,
        ),
        job=JobSettings(
            out=str(store.folder.root),
            source=job.source.to_json(),
            prompt=PromptSettings(
                column=spec.prompt.column,
                template=spec.prompt.template,
                chat=spec.prompt.chat,
                system=spec.prompt.system,
                examples=tuple(Example(user=one.user, assistant=one.assistant) for one in spec.prompt.examples),
            ),
            on_too_long=spec.prompt.on_too_long,
            date=store.date,
            sampling=spec.generate.model_dump() if spec.generate else None,
            embed=_embed(spec.embed) if spec.embed else None,
            carried=columns,
            id_column=spec.input.id,
            calibration=calibration_sample(job.splits, spec.cluster.calibration_rows, rows_to_do=rows_to_do),
        ),
    )


def _embed(embed: EmbedSpec) -> EmbedSettings:
    vector, text = embedding_forms(embed)
    return EmbedSettings(of=embed.of, template=embed.template, form=vector, text=text)


def _number(setting: int | Literal["auto"]) -> int | None:
    return None if setting == "auto" else setting
