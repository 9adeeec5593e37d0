"""The engine as one drives it who adds requests and takes steps: what comes, goes, fails or is withdrawn meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from workers.engine import Engine, SamplingParams
from workers.engine.request import EmbedRequest, Finished, GenerateRequest

MakeEngine = Callable[..., Engine]
Prompts = list[list[int]]


def run(engine: Engine) -> list[Finished]:
    finished = []
    while engine.has_work:
        finished += engine.step()
    return finished


def test_a_failing_row_is_reported_once_however_many_samples_it_has(tiny_engine: MakeEngine) -> None:
    engine = tiny_engine()

    def mask(generated: Any) -> Any:
        allowed = np.ones(603, dtype=bool)
        if len(generated) == 3:
            allowed[:] = False
        return allowed

    params = SamplingParams(max_new_tokens=10, n=4, temperature=1.0)
    engine.add(GenerateRequest(request_id=1, token_ids=[5, 6], params=params, vocabulary_mask=mask))
    engine.add(GenerateRequest(request_id=2, token_ids=[5, 6], params=SamplingParams(max_new_tokens=10)))
    finished = run(engine)
    assert [(f.request_id, f.sample) for f in finished] == [(1, 0), (2, 0)]
    assert finished[0].error is not None


def test_a_step_without_work_is_legal(tiny_engine: MakeEngine) -> None:
    for model_type in ("llama", "mixtral"):
        engine = tiny_engine(model_type)
        assert engine.step() == []
        assert not engine.has_work


def test_an_aborted_request_gets_no_answer_and_leaves_nothing_behind(tiny_engine: MakeEngine, prompts: Prompts) -> None:
    engine = tiny_engine(max_sequences=4)
    params = SamplingParams(max_new_tokens=10, n=2, temperature=1.0)
    for i, prompt in enumerate(prompts[:10]):
        engine.add(GenerateRequest(request_id=i, token_ids=prompt, params=params))
    engine.add(EmbedRequest(request_id=10, token_ids=prompts[0]))
    engine.add(GenerateRequest(request_id=11, token_ids=[], params=params))
    for _ in range(3):
        engine.step()
    for request_id in (0, 1, 5, 10, 11, 99):
        engine.abort(request_id)
    answered = {finished.request_id for finished in run(engine)}
    assert answered.isdisjoint({0, 1, 5, 10})
    assert answered >= {6, 7, 8, 9}
    assert engine.num_running == engine.num_waiting == 0
    engine.add(GenerateRequest(request_id=0, token_ids=prompts[0], params=params))  # the number is free again
    assert len(run(engine)) == 2


def test_a_number_in_use_is_refused(tiny_engine: MakeEngine) -> None:
    engine = tiny_engine()
    engine.add(GenerateRequest(request_id=1, token_ids=[5], params=SamplingParams()))
    with pytest.raises(ValueError, match="request_id 1"):
        engine.add(EmbedRequest(request_id=1, token_ids=[5]))


def test_requests_may_come_while_others_run(tiny_engine: MakeEngine, prompts: Prompts) -> None:
    engine = tiny_engine()
    params = SamplingParams(max_new_tokens=10)
    expected = [output.token_ids for output in tiny_engine().generate(prompts, params)]
    finished: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        engine.add(GenerateRequest(request_id=i, token_ids=prompt, params=params))
        for done in engine.step():
            finished[done.request_id] = done.token_ids
    finished |= {done.request_id: done.token_ids for done in run(engine)}
    assert [finished[i] for i in range(len(prompts))] == expected


def test_a_step_that_raises_loses_nothing(
    tiny_engine: MakeEngine, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine()
    params = SamplingParams(max_new_tokens=10, n=2, temperature=1.0)
    expected = [output.token_ids for output in tiny_engine().generate(prompts[:16], params, keys=[0] * 16)]
    for i, prompt in enumerate(prompts[:16]):
        engine.add(GenerateRequest(request_id=i, token_ids=prompt, params=params))
    finished: list[Finished] = []
    forward, calls = engine.decoder.forward, 0

    def failing(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        hidden = forward(*arguments)
        if calls % 3 == 1:
            raise RuntimeError("a peer is gone")
        return hidden

    monkeypatch.setattr(engine.decoder, "forward", failing)
    while engine.has_work:
        try:
            finished += engine.step()
        except RuntimeError:
            continue
    finished.sort(key=lambda done: (done.request_id, done.sample))
    assert [done.token_ids for done in finished] == expected


def test_an_interrupted_call_leaves_the_engine_without_work(
    tiny_engine: MakeEngine, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine()
    params = SamplingParams(max_new_tokens=10)
    with monkeypatch.context() as patched:

        def interrupted(*arguments: Any) -> Any:
            raise KeyboardInterrupt

        patched.setattr(engine.decoder, "logits", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(prompts, params)
    assert not engine.has_work
    assert len(engine.generate(prompts[:3], params)) == 3


def test_a_step_that_raises_after_its_computing_leaves_the_engine_empty(
    tiny_engine: MakeEngine, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine()
    params = SamplingParams(max_new_tokens=5)
    expected = [output.token_ids for output in engine.generate(prompts[:6], params)]
    for i, prompt in enumerate(prompts[:6]):
        engine.add(GenerateRequest(request_id=i, token_ids=prompt, params=params))
    with monkeypatch.context() as patched:

        def interrupted(*arguments: Any) -> Any:
            raise KeyboardInterrupt

        patched.setattr(engine.tokenizer, "decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(engine)
    assert not engine.has_work
    assert [output.token_ids for output in engine.generate(prompts[:6], params)] == expected


def test_logits_that_are_not_finite_fail_their_row_only(
    tiny_engine: MakeEngine, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine()
    params = SamplingParams(max_new_tokens=6, n=2)
    expected = engine.generate(prompts[:3], params)
    logits, calls = engine.decoder.logits, 0

    def bad(hidden: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        made = logits(hidden)
        if calls == 3:
            made[1] = float("nan")
        return made

    monkeypatch.setattr(engine.decoder, "logits", bad)
    outputs = engine.generate(prompts[:3], params)
    failed = [output for output in outputs if output.error is not None]
    assert [(output.error and output.error.code, output.sample) for output in failed] == [("nonfinite", 0)]
    others = [output.token_ids for output in outputs if output.error is None]
    assert others == [o.token_ids for o in expected if o.prompt_index != failed[0].prompt_index]


@pytest.mark.parametrize(("value", "message"), [(float("nan"), "nan"), (0.0, "0.0")])
def test_a_vector_without_a_direction_fails_its_row_only(
    tiny_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, value: float, message: str
) -> None:
    engine = tiny_engine()
    forward = engine.decoder.forward

    def spoilt(*arguments: Any) -> Any:
        hidden = forward(*arguments)
        hidden[:2] = value
        return hidden

    monkeypatch.setattr(engine.decoder, "forward", spoilt)
    engine.add(EmbedRequest(request_id=0, token_ids=[5, 6]))
    engine.add(EmbedRequest(request_id=1, token_ids=[7, 8]))
    first, second = run(engine)
    assert first.error is not None
    assert first.error.code == "nonfinite"
    assert message in first.error.message
    assert second.vector is not None


def test_generation_and_embedding_run_side_by_side(tiny_engine: MakeEngine, prompts: Prompts, block_bytes: int) -> None:
    engine = tiny_engine(kv_cache_bytes=10 * block_bytes, step_tokens=200)
    params = SamplingParams(max_new_tokens=40, ignore_eos=True)
    for i, prompt in enumerate(prompts[:20]):
        engine.add(GenerateRequest(request_id=2 * i, token_ids=prompt, params=params))
        engine.add(EmbedRequest(request_id=2 * i + 1, token_ids=prompt))
    finished = {done.request_id: done for done in run(engine)}
    whole = tiny_engine()
    expected = [output.token_ids for output in whole.generate(prompts[:20], params)]
    assert [finished[2 * i].token_ids for i in range(20)] == expected
    vectors = whole.embed(prompts[:20])
    for i in range(20):
        np.testing.assert_allclose(finished[2 * i + 1].vector, vectors[i], atol=1e-5)
    assert engine.stats.preemptions > 0


def test_requests_that_have_not_begun_can_be_withdrawn_and_run_elsewhere(
    tiny_engine: MakeEngine, prompts: list[list[int]]
) -> None:
    here, elsewhere = tiny_engine(step_tokens=64), tiny_engine()
    params = SamplingParams(max_new_tokens=4, temperature=1.0, n=2)
    requests = [GenerateRequest(request_id=i, token_ids=prompts[i], params=params, key=i) for i in range(12)]
    for request in requests:
        here.add(request)
    here.abort(11)
    assert here.step() == []
    running = here.num_running
    given = here.withdraw(3)
    assert given == [requests[10], requests[9], requests[8]], "the latest that are still wanted"
    given += here.withdraw(100)
    assert running + len(given) == 11
    assert here.num_waiting == 0
    for request in given:
        elsewhere.add(request)
    answers = {}
    for engine in (here, elsewhere):
        while engine.has_work:
            answers |= {(one.request_id, one.sample): one.token_ids for one in engine.step()}
    expected = tiny_engine().generate(prompts[:11], params, keys=range(11))
    assert answers == {(one.prompt_index, one.sample): one.token_ids for one in expected}
    assert here.withdraw(1) == []
