"""How what a job leaves open about embedding is settled."""

from __future__ import annotations

import json
from dataclasses import replace

from workers import embedding_choice
from workers.embedding_choice import BEST, EmbeddingChoice, settle_embedding

OPEN = EmbeddingChoice(
    pooling="auto", include_prompt="auto", passage_prompt="auto", query_prompt="auto", echo="auto", center="auto"
)
ASKED = EmbeddingChoice(
    pooling="last", include_prompt=False, passage_prompt="p", query_prompt="", echo=True, center=True
)


def test_what_a_job_says_stays(tmp_path):
    assert settle_embedding(ASKED, tmp_path) == ASKED


def test_a_model_without_instructions_gets_what_was_measured_to_be_best(tmp_path, monkeypatch):
    assert settle_embedding(OPEN, tmp_path) == BEST
    monkeypatch.setattr(embedding_choice, "BEST", replace(BEST, pooling="weighted_mean", center=True))
    assert settle_embedding(OPEN, tmp_path) == embedding_choice.BEST


def test_a_job_that_names_its_pooling_gets_no_more_than_that(tmp_path):
    asked = replace(OPEN, pooling="mean")
    assert settle_embedding(asked, tmp_path) == replace(BEST, pooling="mean", echo=False, center=False)


def test_a_model_with_instructions_gets_what_they_say(tmp_path, monkeypatch):
    monkeypatch.setattr(embedding_choice, "BEST", replace(BEST, center=True))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(
        json.dumps({"pooling_mode_lasttoken": True, "include_prompt": False})
    )
    prompts = {"query": "q: ", "passage": "p: "}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    assert settle_embedding(OPEN, tmp_path) == EmbeddingChoice(
        pooling="last", include_prompt=False, passage_prompt="p: ", query_prompt="q: ", echo=False, center=False
    )


def test_dimensions_are_the_jobs_own_else_the_models(tmp_path):
    (tmp_path / "config_sentence_transformers.json").write_text('{"truncate_dim": 256}')
    assert settle_embedding(OPEN, tmp_path).dimensions == 256
    assert settle_embedding(replace(OPEN, dimensions=64), tmp_path).dimensions == 64
    assert settle_embedding(replace(OPEN, pooling="last"), tmp_path).dimensions is None
