"""A JobSpec and what it speaks of -> a job that can be planned: everything settled that the model or the input decides.

Nothing is written, and neither torch nor Ray is loaded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePath

from jobs.spec import JobSpec, JsonObject, OutputSpec, PromptSpec, fingerprint, fingerprint_parts
from pipeline.errors import UserError
from pipeline.model_path import model_digest, resolve_model
from pipeline.prompts import template_columns
from pipeline.source import Source, Split, auto_rows_per_split
from pipeline.suggest import did_you_mean
from workers.pooling_choice import resolve_pooling


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedJob:
    """What an earlier run wrote into the job directory."""

    spec: JobSpec
    fingerprint: str
    parts: JsonObject  # of the fingerprint
    source: JsonObject
    splits: tuple[Split, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedJob:
    """`spec` has no `auto` left where the model or the input decide: prompt.column, embed.pooling, output.*.

    `parts` are what the fingerprint covers, by key.
    """

    spec: JobSpec
    model_path: Path
    source: Source
    splits: tuple[Split, ...]
    parts: JsonObject
    fingerprint: str


def resolve(spec: JobSpec, planned: PlannedJob | None = None) -> ResolvedJob:
    """Settle what is open. With `planned` the input is not scanned again if it is still the one that was planned.

    UserError where the model, the input or a column of it does not exist; JobError that names what changed if the
    planned input is another by now.
    """
    refuse_output_in_input(spec)
    model_path = resolve_model(spec.model)
    if planned is not None and planned.spec.input == spec.input:
        source = Source.from_json(planned.source)
        source.check_unchanged()
    else:
        planned_rows = None
        source = Source.open(_input_path(spec), job=spec.input.job, format=spec.input.format)
    settled = _settle(spec, source, model_path, planned)
    rows_per_split = settled.output.rows_per_split
    assert rows_per_split != "auto"
    if planned is not None and source.to_json() == planned.source and planned.spec.output.rows_per_split == rows_per_split:
        splits = planned.splits
    else:
        splits = tuple(source.splits(rows_per_split))
    parts = fingerprint_parts(
        settled,
        model_digest=model_digest(model_path),
        input_files=[(PurePath(file.path).name, file.digest) for file in source.files],
        rows_per_split=rows_per_split,
    )
    return ResolvedJob(
        spec=settled,
        model_path=model_path,
        source=source,
        splits=splits,
        parts=parts,
        fingerprint=fingerprint(parts),
    )
