"""What a job leaves to the model: how tokens are chosen."""

from __future__ import annotations

import json

import pytest

from pipeline.errors import UserError
from workers.sampling_choice import resolve_sampling

ASKED = {
    "max_new_tokens": 8,
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "min_p": None,
    "repetition_penalty": None,
}


def test_decoding_is_greedy_where_nobody_says(tmp_path):
    params = resolve_sampling(ASKED, tmp_path)
    assert (params.temperature, params.top_p, params.top_k) == (0.0, None, None)


def test_generation_config_says_what_the_job_does_not(tmp_path):
    config = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    params = resolve_sampling(ASKED, tmp_path)
    assert (params.temperature, params.top_p, params.top_k, params.repetition_penalty) == (0.6, 0.9, None, 1.1)
    params = resolve_sampling(ASKED | {"temperature": 0.0, "top_p": 1.0}, tmp_path)
    assert (params.temperature, params.top_p) == (0.0, 1.0)


def test_a_generation_config_that_does_not_sample_gives_greedy_decoding(tmp_path):
    config = {"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    params = resolve_sampling(ASKED, tmp_path)
    assert (params.temperature, params.top_p, params.repetition_penalty) == (0.0, None, 1.1)


@pytest.mark.parametrize("content", ["{", "[]", '{"do_sample": true, "temperature": -1}'])
def test_a_damaged_generation_config_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match=r"generation_config\.json") as caught:
        resolve_sampling(ASKED, tmp_path)
    assert "\n" not in str(caught.value)
