"""A query is embedded as index.json says its rows were."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.embedding import provenance_settings
from jobs.index.query import embed_queries
from jobs.spec import EmbedSpec, JobSpec
from jobs.specfile import parse_spec
from pipeline.errors import UserError
from pipeline.index.manifest import Provenance
from pipeline.model_path import model_digest
from pipeline.tokenizer import load_tokenizer
from workers.engine import Engine

TEXTS = ["How is a file closed?", "What is a tuple?"]
SETTLED = {"passage_prompt": "passage: ", "query_prompt": "", "include_prompt": True, "echo": False, "center": False}


@pytest.fixture
def spec(tiny_model: Callable[..., Path]) -> JobSpec:
    settings = {"model": str(tiny_model("mixtral")), "input": {"path": "x"}, "generate": {}}
    return parse_spec(settings | {"cluster": {"dtype": "float32"}})


def made(spec: JobSpec, **embed: Any) -> Provenance:
    section = EmbedSpec(**SETTLED | embed)
    path = Path(spec.model)
    return Provenance(
        model=spec.model,
        model_files=model_digest(path),
        tokenizer=load_tokenizer(path).digest,
        pooling=section.pooling,
        query_template=section.query_template,
        settings=provenance_settings(spec.model_copy(update={"embed": section})),
    )


@pytest.mark.parametrize(
    ("embed", "asked"),
    [
        ({"pooling": "last", "query_prompt": "query: "}, {"pooling": "last", "prompt": "query: "}),
        ({"pooling": "mean", "dimensions": 8, "center": True}, {"dimensions": 8}),
        ({"pooling": "mean", "echo": True, "routing_weight": 0.5}, {"echo": True, "routing_weight": 0.5}),
        (
            {"pooling": "weighted_mean", "query_prompt": "q: ", "include_prompt": False},
            {"pooling": "weighted_mean", "prompt": "q: ", "include_prompt": False},
        ),
    ],
)
def test_a_query_is_embedded_as_the_index_says(spec: JobSpec, embed: dict[str, Any], asked: dict[str, Any]) -> None:
    vectors = embed_queries(TEXTS, made(spec, **embed), spec)
    engine = Engine.from_checkpoint(spec.model, dtype="float32")
    np.testing.assert_allclose(vectors, engine.embed(TEXTS, **asked), atol=1e-6)


def test_a_query_longer_than_the_models_authors_allow_is_refused(spec: JobSpec, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(spec.model, tmp_path / "model"))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 16}')
    limited = spec.model_copy(update={"model": str(folder)})
    assert len(embed_queries(TEXTS, made(limited, pooling="mean"), limited)) == 2
    with pytest.raises(UserError, match=r"query 'a fox .*tokens with its prompt, and the model's own limit is 16"):
        embed_queries(["a fox " * 20], made(limited, pooling="mean"), limited)


def test_a_query_template_stands_around_the_query(spec: JobSpec) -> None:
    vectors = embed_queries(TEXTS, made(spec, pooling="mean", query_template="Q: {{ text }} A:"), spec)
    engine = Engine.from_checkpoint(spec.model, dtype="float32")
    np.testing.assert_allclose(vectors, engine.embed([f"Q: {text} A:" for text in TEXTS]), atol=1e-6)


def test_settings_are_recorded_where_they_change_something(spec: JobSpec) -> None:
    def recorded(**embed: Any) -> dict[str, Any]:
        section = EmbedSpec(pooling="mean", **SETTLED | embed)
        return provenance_settings(spec.model_copy(update={"embed": section}))

    assert recorded(passage_prompt="") == {}
    assert set(recorded(echo=True, center=True)) == {"passage_prompt", "echo", "centered"}


def test_attention_rules_are_recorded_and_followed(spec: JobSpec) -> None:
    rules = [{"pattern": "sliding", "window": 2}]
    ruled = parse_spec({**spec.to_json(), "attention": rules, "embed": {"pooling": "mean", **SETTLED}})
    assert provenance_settings(ruled)["attention"] == rules
    vectors = embed_queries(TEXTS, made(spec, pooling="mean"), ruled)
    engine = Engine.from_checkpoint(spec.model, dtype="float32", attention=rules)
    np.testing.assert_allclose(vectors, engine.embed(TEXTS), atol=1e-6)
    assert not np.allclose(vectors, Engine.from_checkpoint(spec.model, dtype="float32").embed(TEXTS), atol=1e-3)


def test_a_query_takes_the_long_rope_factors_that_the_job_took(tiny_model: Callable[..., Path]) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4]}
    rope["long_factor"] = [1.0, 1.5, 2.5, 4.0, 9.0]
    model = tiny_model("phi3", original_max_position_embeddings=32, rope_parameters=rope)
    settings = {"model": str(model), "input": {"path": "x"}, "generate": {}, "cluster": {"dtype": "float32"}}
    short = parse_spec(settings | {"engine": {"max_context": 32}})
    vectors = embed_queries(TEXTS, made(short, pooling="mean"), short)
    engine = Engine.from_checkpoint(model, dtype="float32", max_context=32)
    np.testing.assert_allclose(vectors, engine.embed(TEXTS), atol=1e-6)
    assert not np.allclose(vectors, Engine.from_checkpoint(model, dtype="float32").embed(TEXTS), atol=1e-4)


def test_an_index_with_another_echo_is_refused(spec: JobSpec) -> None:
    other = replace(made(spec, pooling="mean"), settings={"echo": ["Say again: ", " "]})
    with pytest.raises(UserError, match="other words around its echoes"):
        embed_queries(TEXTS, other, spec)
