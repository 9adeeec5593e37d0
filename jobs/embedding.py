"""The section `embed` of a settled job in the terms of those who embed, and of index.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.spec import EmbedSpec, JobSpec
from pipeline.embedding import TextForm, VectorForm, form_settings
from pipeline.errors import UserError
from pipeline.index.manifest import Provenance
from pipeline.tokenizer import load_tokenizer


def embedding_forms(embed: EmbedSpec) -> tuple[VectorForm, TextForm]:
    """How the vector is made, and how the text of a passage is put to the model."""
    assert embed.include_prompt != "auto"
    assert embed.echo != "auto"
    vector = _vector_form(embed, embed.pooling)
    text = TextForm(prompt=embed.passage_prompt, include_prompt=embed.include_prompt, echo=embed.echo)
    return vector, text


def _vector_form(embed: EmbedSpec, pooling: str) -> VectorForm:
    return VectorForm(pooling=pooling, dimensions=embed.dimensions, routing_weight=embed.routing_weight)


def vector_width(embed: EmbedSpec, hidden_width: int, router_width: int) -> int:
    """Whatever the pooling. UserError where a model of these widths has no such vectors."""
    try:
        return _vector_form(embed, "mean").width(hidden_width, router_width)
    except ValueError as error:
        raise UserError(f"embed.{error}") from None


def provenance_settings(spec: JobSpec) -> dict[str, Any]:
    """What index.json says of how a job's vectors were made, besides model, pooling and query template."""
    assert spec.embed is not None
    vector, text = embedding_forms(spec.embed)
    settings = form_settings(vector, text, query_prompt=spec.embed.query_prompt, centered=spec.embed.center is True)
    return settings | ({"attention": list(spec.attention_rules)} if spec.attention is not None else {})


def job_provenance(spec: JobSpec, *, model_files: Mapping[str, str], model_path: Path) -> Provenance:
    """What makes the job's vectors comparable with others."""
    assert spec.embed is not None
    return Provenance(
        model=spec.model,
        model_files=model_files,
        tokenizer=load_tokenizer(model_path).digest,
        pooling=spec.embed.pooling,
        query_template=spec.embed.query_template,
        settings=provenance_settings(spec),
    )
