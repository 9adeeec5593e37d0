"""What a job's index would be, from numbers alone: told by `plan`, and before a run that could not build it."""

from __future__ import annotations

from jobs.embedding import vector_width
from jobs.resolve import ResolvedJob
from jobs.spec import IndexSpec, JobSpec
from pipeline.index.budget import BuildBudget, build_budget, refuse_untrainable
from pipeline.index.kinds import AUTO, DEFAULT_MEMORY_BYTES, FLAT, settled_kinds


def most_vectors(spec: JobSpec, num_rows: int) -> int:
    """Of a job whose rows all succeed."""
    assert spec.embed is not None
    samples = spec.generate.n if spec.generate is not None and spec.embed.of != "prompt" else 1
    return num_rows * (samples + (1 if spec.embed.of == "both" else 0))


def planned_index(asked: IndexSpec, *, num_vectors: int, dimension: int) -> tuple[tuple[str, ...], BuildBudget]:
    """The kinds to be tried in turn, and how the first is built. UserError where it can't be."""
    memory_bytes = DEFAULT_MEMORY_BYTES if asked.memory_bytes == "auto" else asked.memory_bytes
    kinds = settled_kinds(asked.kind, num_vectors=num_vectors, dimension=dimension, memory_bytes=memory_bytes)
    shards = None if asked.shards == "auto" else asked.shards
    budget = build_budget(kinds[0], num_vectors, dimension, memory_bytes=memory_bytes, shards=shards)
    refuse_untrainable(budget, num_vectors, dimension)
    return kinds, budget


def refuse_unbuildable(job: ResolvedJob) -> None:
    """UserError for an index that could not be built, before rows are run for it.

    Where `auto` chooses within the usual memory there is no such index, and the model isn't looked at.
    """
    asked, embed = job.spec.index, job.spec.embed
    if asked is None or embed is None:
        return
    if asked.kind.strip().lower() in (AUTO, FLAT.lower()) and asked.memory_bytes == "auto":
        return
    from workers.forecast import model_widths  # brings torch, a second or two

    dimension = vector_width(embed, *model_widths(job.model_path))
    planned_index(asked, num_vectors=most_vectors(job.spec, job.source.num_rows), dimension=dimension)
