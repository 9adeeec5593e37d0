"""What a job leaves open about embedding, as the model's own files settle it, or else as benchmarks found best."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from pipeline.embedding import Pooling
from pipeline.sentence_transformers import read_embedder

Auto = Literal["auto"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingChoice:
    """`auto` leaves a setting to the model's sentence-transformers files, and to BEST where they say nothing."""

    pooling: Pooling | Auto
    include_prompt: bool | Auto
    passage_prompt: str  # `auto`, or the prompt itself
    query_prompt: str
    echo: bool | Auto
    center: bool | Auto
    dimensions: int | None = None  # None: as many as the model's files keep, else all


# For models without instructions of their own: what `python -m benchmarks.retrieval` found best (docs/embeddings.md).
BEST: Final = EmbeddingChoice(
    pooling="mean", include_prompt=True, passage_prompt="", query_prompt="", echo=True, center=False
)


def settle_embedding(asked: EmbeddingChoice, model_path: Path) -> EmbeddingChoice:
    """`asked` without `auto`. UserError if the model's files are damaged or ask for what can't be done.

    BEST is chosen whole: where the job or the model names a pooling, `auto` neither echoes nor centres.
    """
    files = read_embedder(model_path, pooling_is_given=asked.pooling != "auto")
    takes_best = asked.pooling == "auto" and files.pooling is None
    return EmbeddingChoice(
        pooling=(files.pooling or BEST.pooling) if asked.pooling == "auto" else asked.pooling,
        include_prompt=files.include_prompt if asked.include_prompt == "auto" else asked.include_prompt,
        passage_prompt=files.passage_prompt if asked.passage_prompt == "auto" else asked.passage_prompt,
        query_prompt=files.query_prompt if asked.query_prompt == "auto" else asked.query_prompt,
        echo=(takes_best and BEST.echo is True) if asked.echo == "auto" else asked.echo,
        center=(takes_best and BEST.center is True) if asked.center == "auto" else asked.center,
        dimensions=files.dimensions if asked.dimensions is None else asked.dimensions,
    )
