"""A JobSpec and what it speaks of -> a job that can be planned: everything settled that the model or the input decides.

Nothing is written, and neither torch nor Ray is loaded, but for torch with cluster.expert_parallel, attention,
embed.dimensions or embed.routing_weight set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from jobs.embedding import vector_width
from jobs.output_path import refuse_output_in_input
from jobs.spec import EmbedSpec, JobSpec, JsonObject, fingerprint, fingerprint_parts
from pipeline.errors import JobError, UserError
from pipeline.model_path import model_digest, resolve_model
from pipeline.row_text import RowText
from pipeline.source import Source, Split, auto_rows_per_split
from workers.embedding_choice import EmbeddingChoice, settle_embedding


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedJob:
    """What an earlier run wrote into the job directory. `covers` is what its fingerprint is of."""

    spec: JobSpec
    fingerprint: str
    date: str
    covers: JsonObject
    source: JsonObject
    splits: tuple[Split, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedJob:
    """`spec` has no `auto` left where the model or the input decide: prompt.column, embed.*, output.*."""

    spec: JobSpec
    model_path: Path
    source: Source
    splits: tuple[Split, ...]
    covers: JsonObject
    fingerprint: str


def resolve(
    spec: JobSpec, planned: PlannedJob | None = None, *, extended_by: Collection[str] = frozenset()
) -> ResolvedJob:
    """Settle what is open.

    With `planned`, the input is not scanned again if it is still the one that was planned, and `auto` is what it was
    then. Files that are `extended_by` came later and are other jobs' rows. UserError where the model, the input or a
    column of it does not exist; JobError that names what changed if the planned input is another by now.
    """
    refuse_output_in_input(spec)
    model_path = resolve_model(spec.model)
    refuse_spreading(spec, model_path)
    refuse_attention(spec, model_path)
    known = Source.from_json(planned.source) if planned is not None and planned.spec.input == spec.input else None
    if known is not None and known.means(spec.input.path, spec.input.job):
        source, is_scanned = known, False
        _refuse_new_files(spec, [path for path in source.new_files() if path not in extended_by])
    else:
        source, is_scanned = Source.open(spec.input.path, job=spec.input.job, format=spec.input.format), True
    settled, rows_per_split = _settle(spec, source, model_path, planned)
    refuse_vectors(settled, model_path)
    covers = fingerprint_parts(
        settled,
        model_digest=model_digest(model_path),
        input_files=[(PurePath(file.path).name, file.digest) for file in source.files],
        rows_per_split=rows_per_split,
    )
    identity = fingerprint(covers)
    if planned is not None and planned.fingerprint == identity:
        splits = planned.splits
    else:
        splits = tuple(source.splits(rows_per_split)) if is_scanned else ()  # the latter is refused: another job
    return ResolvedJob(
        spec=settled,
        model_path=model_path,
        source=source,
        splits=splits,
        covers=covers,
        fingerprint=identity,
    )


def _refuse_new_files(spec: JobSpec, paths: Sequence[str]) -> None:
    for path in paths:
        mend = f"; `gristmill index extend {spec.output.path}` adds its rows to the index" if spec.index else ""
        raise JobError(f"input {path} has been added since the job was planned{mend}")


def refuse_spreading(spec: JobSpec, model_path: Path) -> None:
    """UserError where more ranks are asked for than the model has experts to spread over them."""
    ranks = spec.cluster.expert_parallel
    if ranks == "auto" or ranks == 1:
        return
    from workers.forecast import expert_layers

    _, num_experts = expert_layers(model_path)
    if not num_experts:
        raise UserError(
            f"cluster.expert_parallel: {ranks} spreads a model's experts, and {spec.model} is a dense model without "
            "any; leave it at 1, and set cluster.replicas for more shards"
        )
    if ranks > num_experts:
        raise UserError(
            f"cluster.expert_parallel: {ranks} shards are more than the {num_experts} experts a layer of {spec.model}; "
            "set it lower, and cluster.replicas for more shards"
        )


def refuse_attention(spec: JobSpec, model_path: Path) -> None:
    """UserError where the rules don't fit the model's layers: told before a job directory keeps them."""
    if spec.attention is None:
        return
    from workers.decoder.attention_choice import with_attention
    from workers.decoder.checkpoint import load_checkpoint

    with_attention(load_checkpoint(model_path), spec.attention_rules)


def refuse_vectors(spec: JobSpec, model_path: Path) -> None:
    """UserError where the model has no vectors of these `dimensions`, or nothing for a `routing_weight` to weigh."""
    if spec.embed is None or not (spec.embed.dimensions or spec.embed.routing_weight):
        return
    from workers.forecast import model_widths

    vector_width(spec.embed, *model_widths(model_path))


def _settle(spec: JobSpec, source: Source, model_path: Path, planned: PlannedJob | None) -> tuple[JobSpec, int]:
    """The spec without what the model or the input decide, and rows_per_split."""
    prompt = spec.prompt
    if _reads_prompt(spec) and prompt.template is None and prompt.column is None:
        text = RowText(source.columns, text_column=source.text_column)
        prompt = prompt.model_copy(update={"column": text.columns[0]})
    settled = spec.model_copy(update={"prompt": prompt})
    carried = _carried(settled, source)
    _refuse_columns(settled, source, carried)
    rows_per_split = spec.output.rows_per_split
    if rows_per_split == "auto" and planned is not None:
        rows_per_split = planned.covers["rows_per_split"]
    if rows_per_split == "auto":
        rows_per_split = auto_rows_per_split(source.num_rows)
    output = spec.output.model_copy(update={"columns": carried, "rows_per_split": rows_per_split})
    embed = spec.embed
    if embed is not None:
        embed = _settle_embed(embed, model_path)
    return settled.model_copy(update={"output": output, "embed": embed}), rows_per_split


def _settle_embed(embed: EmbedSpec, model_path: Path) -> EmbedSpec:
    """A query_template is written for the model: its own prompt for queries is then left to it."""
    choice = settle_embedding(
        EmbeddingChoice(
            pooling=embed.pooling,
            include_prompt=embed.include_prompt,
            passage_prompt=embed.passage_prompt,
            query_prompt="" if embed.query_template != "{{ text }}" else embed.query_prompt,
            echo=embed.echo,
            center=embed.center,
            dimensions=embed.dimensions,
        ),
        model_path,
    )
    return embed.model_copy(update=dataclasses.asdict(choice))


def _reads_prompt(spec: JobSpec) -> bool:
    """Whether the prompt is looked at: to continue it, or to embed it."""
    return spec.generate is not None or (spec.embed is not None and spec.embed.template is None)


def _carried(spec: JobSpec, source: Source) -> tuple[str, ...]:
    """output.columns; `auto` are those that the prompt and the embedded text are made of."""
    texts = []
    if _reads_prompt(spec):
        texts.append(RowText(source.columns, column=spec.prompt.column, template=spec.prompt.template))
    if spec.embed is not None and spec.embed.template is not None:
        texts.append(RowText(source.columns, template=spec.embed.template, section="embed"))
    named = tuple(dict.fromkeys(column for text in texts for column in text.columns))
    return named if spec.output.columns == "auto" else spec.output.columns


def _refuse_columns(spec: JobSpec, source: Source, carried: tuple[str, ...]) -> None:
    """UserError for a column that the input does not have, wherever it is named."""
    source.columns.select([*carried, *([spec.input.id] if spec.input.id else [])])
