"""What a job leaves to the model: pooling, and how tokens are chosen."""

from __future__ import annotations

import json

import pytest

from pipeline.errors import UserError
from workers.pooling_choice import resolve_pooling
from workers.sampling_choice import resolve_sampling


def write_pooling(folder, **config):
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, "last"),
        ({"pooling_mode_weightedmean_tokens": True}, "weighted_mean"),
        ({"pooling_mode": "lasttoken", "embedding_dimension": 8}, "last"),
    ],
)
def test_pooling_is_what_the_models_authors_say(tmp_path, config, expected):
    write_pooling(tmp_path, **config)
    assert resolve_pooling("auto", tmp_path) == expected
    assert resolve_pooling("mean", tmp_path) == "mean", "unless the job says otherwise"


def test_pooling_is_the_mean_where_nobody_says(tmp_path):
    assert resolve_pooling("auto", tmp_path) == "mean"
    assert resolve_pooling("auto", tmp_path / "model.gguf") == "mean"


@pytest.mark.parametrize(
    "config",
    [{"pooling_mode_cls_token": True}, {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, {}],
)
def test_a_pooling_that_is_not_supported_is_refused(tmp_path, config):
    write_pooling(tmp_path, **config)
    with pytest.raises(UserError, match=r"set embed\.pooling to mean, last or weighted_mean"):
        resolve_pooling("auto", tmp_path)


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
