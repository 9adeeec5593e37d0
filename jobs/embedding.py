"""The section `embed` of a settled job in the terms of those who embed, and of index.json."""

from __future__ import annotations

from typing import Any

from jobs.spec import EmbedSpec
from pipeline.embedding import TextForm, VectorForm, form_settings


def embedding_forms(embed: EmbedSpec) -> tuple[VectorForm, TextForm]:
    """How the vector is made, and how the text of a passage is put to the model."""
    assert embed.include_prompt != "auto"
    assert embed.echo != "auto"
    vector = VectorForm(pooling=embed.pooling, dimensions=embed.dimensions, routing_weight=embed.routing_weight)
    text = TextForm(prompt=embed.passage_prompt, include_prompt=embed.include_prompt, echo=embed.echo)
    return vector, text


def provenance_settings(embed: EmbedSpec) -> dict[str, Any]:
    vector, text = embedding_forms(embed)
    return form_settings(vector, text, query_prompt=embed.query_prompt, centered=embed.center is True)
