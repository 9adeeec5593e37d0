"""The engine on small real checkpoints: its tokens are transformers', and each row's are its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from workers.engine import Engine, SamplingParams
from workers.engine.request import Finished

MakeEngine = Callable[..., Engine]
Prompts = list[list[int]]
END = 2  # of a text: tiny models' eos_token_id


@cache
def transformers_model(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("llama", {}),
        ("mixtral", {}),
        ("mistral", {"sliding_window": 24}),
        ("gemma3_text", {}),  # two groups of layers, one with a window
        ("gpt2", {}),  # positions in a table
        ("bloom", {}),  # slopes
        ("deepseek_v3", {}),  # a cache of latents
        ("gpt_oss", {}),  # sinks, and windows in every other layer
    ],
)
def test_greedy_tokens_are_transformers_own(
    tiny_model: Callable[..., Path],
    tiny_engine: MakeEngine,
    prompts: Prompts,
    most_likely: Any,
    model_type: str,
    overrides: dict[str, Any],
) -> None:
    engine = tiny_engine(model_type, model=overrides)
    chosen = prompts[:12]
    outputs = engine.generate(chosen, SamplingParams(max_new_tokens=24))
    model = transformers_model(tiny_model(model_type, **overrides))
    for prompt, output in zip(chosen, outputs, strict=True):
        following = most_likely(model, prompt, output.token_ids)
        assert following[:-1] == output.token_ids
        assert END not in output.token_ids
        assert len(output.token_ids) == 24 or following[-1] == END


VARIED = [
    SamplingParams(max_new_tokens=12),
    SamplingParams(max_new_tokens=14, temperature=0.8, seed=3),
    SamplingParams(max_new_tokens=22, temperature=1.2, top_p=0.9, n=3, seed=1),
    SamplingParams(max_new_tokens=8, temperature=1.0, top_k=20, repetition_penalty=1.2, n=2),
    SamplingParams(max_new_tokens=18, repetition_penalty=1.3, ignore_eos=True, logprobs=True),
]


def answers(engine: Engine, prompts: Prompts, params: list[SamplingParams], keys: list[int]) -> list[Any]:
    outputs = engine.generate(prompts, params, keys=keys)
    return [(output.sample, output.token_ids, output.text, output.finish_reason) for output in outputs]


@pytest.fixture(scope="module")
def alone(tiny_engine: MakeEngine, prompts: Prompts) -> list[list[Any]]:
    """Every prompt by itself, by its own engine call."""
    engine = tiny_engine()
    return [answers(engine, [prompt], [VARIED[i % 5]], [i]) for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize(
    ("options", "expects"),  # "num_blocks": of 16 tokens
    [
        ({}, "a whole batch"),
        ({"reuse_prefixes": False}, "no found tokens"),
        ({"num_blocks": 7, "block_tokens": 8}, "preemptions"),
        ({"num_blocks": 8, "block_tokens": 8, "reuse_prefixes": False}, "preemptions"),
        ({"step_tokens": 7}, "chunks"),
        ({"step_tokens": 33, "num_blocks": 9, "block_tokens": 8, "max_sequences": 6}, "preemptions"),
        ({"max_sequences": 3}, "a batch of 3"),
    ],
    ids=str,
)
def test_a_rows_tokens_do_not_depend_on_batch_mates_preemption_chunks_or_prefixes(
    tiny_engine: MakeEngine,
    prompts: Prompts,
    alone: list[list[Any]],
    block_bytes: int,
    options: dict[str, Any],
    expects: str,
) -> None:
    options = dict(options)
    if "num_blocks" in options:
        options["kv_cache_bytes"] = options.pop("num_blocks") * block_bytes
    engine = tiny_engine(**options)
    params = [VARIED[i % 5] for i in range(len(prompts))]
    together = answers(engine, prompts, params, list(range(len(prompts))))
    assert together == [answer for each in alone for answer in each]
    if expects == "preemptions":
        assert engine.stats.preemptions > 0
    if expects == "no found tokens":
        assert engine.stats.found_tokens == 0
    elif options.get("reuse_prefixes", True):
        assert engine.stats.found_tokens > 0


def test_three_in_a_batch_say_what_each_says_alone(
    tiny_engine: MakeEngine, prompts: Prompts, alone: list[list[Any]]
) -> None:
    engine = tiny_engine()
    for begin in range(0, 30, 3):
        rows = range(begin, begin + 3)
        together = answers(engine, [prompts[i] for i in rows], [VARIED[i % 5] for i in rows], list(rows))
        assert together == [answer for i in rows for answer in alone[i]]


def test_the_state_of_the_cache_after_other_work_changes_nothing(
    tiny_engine: MakeEngine, prompts: Prompts, block_bytes: int
) -> None:
    engine = tiny_engine(kv_cache_bytes=40 * block_bytes)
    params = SamplingParams(max_new_tokens=12, temperature=1.0, n=2)
    first = [output.token_ids for output in engine.generate(prompts, params)]
    assert [output.token_ids for output in engine.generate(prompts, params)] == first


def test_default_keys_tell_equal_prompts_apart_and_depend_on_nothing_else(tiny_engine: MakeEngine) -> None:
    engine = tiny_engine()
    params = SamplingParams(max_new_tokens=12, temperature=1.5, ignore_eos=True)
    a, b = [5, 6, 7], [8, 9]
    mixed = [output.token_ids for output in engine.generate([a, b, a], params)]
    alike = [output.token_ids for output in engine.generate([a, a], params)]
    assert mixed[0] != mixed[2]
    assert alike == [mixed[0], mixed[2]]


def test_outputs_come_in_the_order_of_prompts_then_samples(tiny_engine: MakeEngine, prompts: Prompts) -> None:
    outputs = tiny_engine().generate(prompts[:9], SamplingParams(max_new_tokens=6, n=3, temperature=1.0))
    assert [(output.prompt_index, output.sample) for output in outputs] == [(i, n) for i in range(9) for n in range(3)]


def test_samples_differ_and_compute_their_prompt_once(tiny_engine: MakeEngine) -> None:
    engine = tiny_engine()
    prompt = list(range(10, 51))
    outputs = engine.generate([prompt], SamplingParams(max_new_tokens=10, n=6, temperature=1.5, ignore_eos=True))
    assert len({tuple(output.token_ids) for output in outputs}) == 6
    assert engine.stats.prefill_tokens == len(prompt)


def test_logprobs_are_those_of_the_model(tiny_engine: MakeEngine, tiny_model: Callable[..., Path]) -> None:
    prompt = [5, 77, 301, 12]
    [output] = tiny_engine().generate(
        [prompt], SamplingParams(max_new_tokens=10, temperature=0.7, top_k=5, logprobs=True, ignore_eos=True)
    )
    with torch.inference_mode():
        logits = transformers_model(tiny_model())(torch.tensor([prompt + output.token_ids])).logits[
            0, len(prompt) - 1 : -1
        ]
    expected = torch.log_softmax(logits.double(), -1)[torch.arange(10), output.token_ids]
    assert output.logprobs == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_stop_token_ends_the_text_before_itself(tiny_engine: MakeEngine) -> None:
    engine = tiny_engine()
    [free] = engine.generate([[5, 6]], SamplingParams(max_new_tokens=10, ignore_eos=True))
    stop = free.token_ids[4]
    [output] = engine.generate([[5, 6]], SamplingParams(max_new_tokens=10, ignore_eos=True, stop_token_ids=[stop]))
    assert output.token_ids == free.token_ids[: free.token_ids.index(stop)]
    assert output.finish_reason == "stop"
    assert free.finish_reason == "length"


def with_likely_end(engine: Engine) -> Engine:
    """The same, with the end-of-text token so likely that many texts end early."""
    logits = engine.decoder.logits

    def shifted(hidden: torch.Tensor) -> torch.Tensor:
        made = logits(hidden)
        made[:, 2] += 4
        return made

    engine.decoder.logits = shifted  # type: ignore[method-assign]
    return engine


def test_an_end_of_text_token_ends_it_unless_ignored(tiny_engine: MakeEngine, prompts: Prompts) -> None:
    engine = with_likely_end(tiny_engine())
    params = {"max_new_tokens": 30, "temperature": 1.0}
    stopped = engine.generate(prompts, SamplingParams(**params))
    ignored = engine.generate(prompts, SamplingParams(ignore_eos=True, **params))
    ended = [i for i, output in enumerate(stopped) if output.finish_reason == "stop"]
    assert ended
    for i in ended:
        length = len(stopped[i].token_ids)
        assert ignored[i].token_ids[: length + 1] == [*stopped[i].token_ids, 2]
        assert ignored[i].finish_reason == "length"


def test_a_stop_string_is_left_out_wherever_token_borders_fall(tiny_engine: MakeEngine) -> None:
    engine = tiny_engine()
    params = {"max_new_tokens": 40, "temperature": 1.0, "ignore_eos": True}
    key = 12
    [free] = engine.generate(["def f(x):"], SamplingParams(**params), keys=[key])
    assert free.text is not None
    stops = [free.text[begin : begin + 4] for begin in range(len(free.text) - 4)]
    stops = [stop for stop in stops if "\ufffd" not in stop]
    assert len(stops) > 10
    each = [SamplingParams(stop=stop, **params) for stop in stops]
    for stop, output in zip(
        stops, engine.generate(["def f(x):"] * len(stops), each, keys=[key] * len(stops)), strict=True
    ):
        assert output.text == free.text[: free.text.index(stop)]
        assert output.finish_reason == "stop"
        assert output.token_ids == free.token_ids[: len(output.token_ids)]


def test_a_stop_string_that_names_a_control_token_stops_at_it(tiny_engine: MakeEngine, prompts: Prompts) -> None:
    engine = with_likely_end(tiny_engine())
    params = {"max_new_tokens": 30, "temperature": 1.0}
    by_eos = engine.generate(prompts[:16], SamplingParams(**params))
    by_name = engine.generate(prompts[:16], SamplingParams(ignore_eos=True, stop="<|im_end|>", **params))
    assert any(output.finish_reason == "stop" for output in by_eos)
    assert [output.token_ids for output in by_name] == [output.token_ids for output in by_eos]


def test_text_prompts_are_tokenized_as_the_checkpoints_tokenizer_does(
    tiny_engine: MakeEngine, tiny_model: Callable[..., Path]
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    text = "<|im_start|>user\nWhat does print do?<|im_end|>\n"
    engine = tiny_engine()
    params = SamplingParams(max_new_tokens=12)
    by_text, by_ids = engine.generate([text, tokenizer(text).input_ids], params)
    assert by_text.token_ids == by_ids.token_ids
    assert by_text.prompt_tokens == len(tokenizer(text).input_ids)
    assert by_text.text == tokenizer.decode(by_text.token_ids, skip_special_tokens=True)


def test_generation_that_reaches_the_end_of_the_context_finishes_with_length(tiny_engine: MakeEngine) -> None:
    engine = tiny_engine(max_context=32)
    [output] = engine.generate([[5] * 20], SamplingParams(max_new_tokens=1000, ignore_eos=True))
    assert len(output.token_ids) == 12
    assert output.finish_reason == "length"


def test_rows_that_can_not_be_served_fail_alone(tiny_engine: MakeEngine, block_bytes: int) -> None:
    engine = tiny_engine(kv_cache_bytes=4 * block_bytes, max_context=100)
    good = [5, 6, 7]
    prompts: list[Any] = [good, [], [5] * 100, [5] * 70, "", "\ud800", [603], good]
    outputs = engine.generate(prompts, SamplingParams(max_new_tokens=5))
    assert [output.error and output.error.code for output in outputs] == [
        None,
        "empty_prompt",
        "prompt_too_long",
        "request_too_large",
        "empty_prompt",
        "not_text",
        "internal",
        None,
    ]
    assert outputs[0].token_ids == outputs[-1].token_ids
    assert engine.stats.errors == 5  # text that is none never reached the engine


@pytest.mark.parametrize("pooling", ["mean", "last", "weighted_mean"])
def test_embeddings_are_unit_vectors_of_the_pooled_hidden_states(
    tiny_engine: MakeEngine, tiny_model: Callable[..., Path], prompts: Prompts, pooling: str
) -> None:
    model = transformers_model(tiny_model()).model
    expected = []
    for prompt in prompts[:20]:
        with torch.inference_mode():
            states = model(torch.tensor([prompt])).last_hidden_state[0].double()
        weights = {
            "mean": torch.ones(len(prompt)),
            "last": torch.eye(len(prompt))[-1],
            "weighted_mean": torch.arange(1, len(prompt) + 1),
        }[pooling]
        expected.append(torch.nn.functional.normalize(weights.double() @ states, dim=0).numpy())
    for options in ({}, {"step_tokens": 7}):
        vectors = tiny_engine(**options).embed(prompts[:20], pooling=pooling)
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(vectors, np.array(expected), atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_a_text_without_an_embedding_is_named(tiny_engine: MakeEngine) -> None:
    with pytest.raises(ValueError, match="text 1 has no embedding: empty_prompt"):
        tiny_engine().embed(["one", "", "three"])


def test_without_a_tokenizer_it_gives_token_ids_and_knows_the_end_of_text(
    tiny_engine: MakeEngine, prompts: Prompts
) -> None:
    engine = with_likely_end(tiny_engine(model={"tokenizer": False}))
    params = SamplingParams(max_new_tokens=30, temperature=1.0)
    outputs = engine.generate(prompts[:16], params)
    assert all(output.text is None for output in outputs)
    with_text = with_likely_end(tiny_engine()).generate(prompts[:16], params)
    assert [output.token_ids for output in outputs] == [output.token_ids for output in with_text]
    assert any(output.finish_reason == "stop" for output in outputs)
    with pytest.raises(ValueError, match="no tokenizer"):
        engine.generate(["text"])
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        engine.generate([[1]], SamplingParams(stop="x"))


def test_the_cache_stays_within_its_stated_budget(tiny_engine: MakeEngine, block_bytes: int) -> None:
    budget = 10 * block_bytes + block_bytes // 2
    engine = tiny_engine(kv_cache_bytes=budget)
    assert engine.cache.nbytes == 10 * block_bytes
    with pytest.raises(ValueError, match="kv_cache_bytes"):
        tiny_engine(kv_cache_bytes=block_bytes - 1)


@pytest.mark.parametrize("option", ["max_context", "step_tokens", "max_sequences"])
def test_a_size_of_nothing_is_refused_by_name(tiny_engine: MakeEngine, option: str) -> None:
    with pytest.raises(ValueError, match=option):
        tiny_engine(**{option: 0})


def test_wrong_calls_are_refused(tiny_engine: MakeEngine) -> None:
    engine = tiny_engine()
    with pytest.raises(ValueError, match="list"):
        engine.generate("text")
    with pytest.raises(ValueError, match="2 params for 1"):
        engine.generate([[1]], [SamplingParams()] * 2)
    with pytest.raises(ValueError, match="2 keys for 1"):
        engine.generate([[1]], keys=[1, 2])
    with pytest.raises(ValueError, match="pooling"):
        engine.embed([[1]], pooling="max")
    assert engine.generate([]) == []
    assert engine.embed([]).shape == (0, 60)


def test_a_long_list_is_added_a_little_ahead_of_what_runs(
    tiny_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine()
    most, step = 0, engine.step

    def watched() -> list[Finished]:
        nonlocal most
        most = max(most, engine.num_waiting)
        return step()

    monkeypatch.setattr(engine, "step", watched)
    outputs = engine.generate([[5 + i % 500] for i in range(1500)] + [[]] * 1500, SamplingParams(max_new_tokens=1))
    assert len(outputs) == 3000
    assert most < 1000
