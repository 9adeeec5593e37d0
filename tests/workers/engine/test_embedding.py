"""Vectors of the engine against hidden states of transformers, pooled by hand as sentence-transformers pools them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.embedding import ECHO_BEFORE, ECHO_BETWEEN, EmbeddedText, VectorForm
from pipeline.errors import RowError
from workers.embedding_choice import EmbeddingChoice, settle_embedding
from workers.engine import Engine, SamplingParams
from workers.engine.request import EmbedRequest, Finished, GenerateRequest, VectorRequest

TEXTS = [
    "The with statement closes a file.",
    "A tuple",
    "A coroutine suspends itself with await, and what awaits it goes on when it is done. " * 3,
    "éclair ☂ <|im_end|>",
    "Default values are evaluated once.",
]
QUERY = "Instruct: find the passage\nQuery: "
OPEN = EmbeddingChoice(
    pooling="auto", include_prompt="auto", passage_prompt="auto", query_prompt="auto", echo="auto", center="auto"
)
STEPS = [{}, {"step_tokens": 7}, {"max_sequences": 1, "step_tokens": 64}]


def embedder(source: Path, folder: Path, *, pooling: str, include_prompt: bool, after: str) -> Path:
    """A checkpoint with the files of a published decoder embedder; its tokenizer's template ends texts with `after`."""
    shutil.copytree(source, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    template: list[Any] = [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}] if "<|im_start|>" in after else []
    template.append({"Sequence": {"id": "A", "type_id": 0}})
    template.append({"SpecialToken": {"id": after.split()[-1], "type_id": 0}})
    special = {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in after.split()}
    own = {"type": "TemplateProcessing", "single": template, "pair": template, "special_tokens": special}
    own["pair"] = [*template, {"Sequence": {"id": "B", "type_id": 1}}]
    tokenizer["post_processor"] = {
        "type": "Sequence",
        "processors": [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}, own],
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    kinds = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for kind, path in kinds]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    config = {"word_embedding_dimension": 60, f"pooling_mode_{pooling}": True, "include_prompt": include_prompt}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    prompts = {"prompts": {"query": QUERY, "document": "passage: "}, "similarity_fn_name": "cosine"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    return folder


def as_sentence_transformers(folder: Path, texts: list[str], prompt: str, pooling: str, include_prompt: bool) -> Any:
    """encode(): the prompt before each text, the tokenizer's own template, a padded batch, pooled and normalised."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    batch = tokenizer([prompt + text for text in texts], padding=True, return_tensors="pt")
    with torch.inference_mode():
        states = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state.double()
    mask = batch.attention_mask.clone()
    if not include_prompt:
        ids = tokenizer(prompt).input_ids
        mask[:, : len(ids) - (ids[-1] in tokenizer.all_special_ids)] = 0
    weights = mask.double()
    if pooling == "weightedmean_tokens":
        weights = weights * torch.arange(1, mask.shape[1] + 1)
    if pooling == "lasttoken":
        last = mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)
        weights = torch.nn.functional.one_hot(last, mask.shape[1]).double()
    return torch.nn.functional.normalize((weights[..., None] * states).sum(1), dim=1).numpy()


@pytest.mark.parametrize(
    ("family", "pooling", "include_prompt", "after"),
    [
        ("mistral", "lasttoken", True, "<|im_start|> <|im_end|>"),  # as E5-Mistral
        ("qwen3", "lasttoken", True, "<|endoftext|>"),  # as Qwen3-Embedding
        ("llama", "mean_tokens", False, "<|im_start|> <|im_end|>"),  # as INSTRUCTOR models
        ("llama", "weightedmean_tokens", True, "<|endoftext|>"),  # as SGPT
    ],
)
def test_a_published_embedder_gives_the_vectors_that_its_authors_meant(
    tiny_model: Callable[..., Path], tmp_path: Path, family: str, pooling: str, include_prompt: bool, after: str
) -> None:
    folder = embedder(
        tiny_model(family), tmp_path / "model", pooling=pooling, include_prompt=include_prompt, after=after
    )
    settled = settle_embedding(OPEN, folder)
    texts = [text.replace("<|im_end|>", "") for text in TEXTS]  # rows' control strings are text here, and not there
    for prompt in (settled.query_prompt, settled.passage_prompt):
        expected = as_sentence_transformers(folder, texts, prompt, pooling, include_prompt)
        for options in STEPS:
            engine = Engine.from_checkpoint(folder, dtype="float32", **options)
            found = engine.embed(texts, settled.pooling, prompt=prompt, include_prompt=bool(settled.include_prompt))
            assert (1 - (found * expected).sum(axis=1)).max() < 1e-6
            assert np.abs(found - expected).max() < 1e-4


def cut(vectors: Any, dimensions: int) -> Any:
    return vectors[:, :dimensions] / np.linalg.norm(vectors[:, :dimensions], axis=1, keepdims=True)


def test_vectors_may_be_cut_to_their_first_dimensions(tiny_engine: Callable[..., Engine]) -> None:
    engine = tiny_engine()
    np.testing.assert_allclose(engine.embed(TEXTS, dimensions=7), cut(engine.embed(TEXTS), 7), atol=1e-6)
    with pytest.raises(ValueError, match="dimensions: 61, and the model's hidden states have 60"):
        engine.embed(TEXTS, dimensions=61)


@pytest.mark.parametrize("pooling", ["mean", "last", "weighted_mean"])
def test_an_echo_is_pooled_over_the_second_occurrence(tiny_engine: Callable[..., Engine], pooling: str) -> None:
    engine = tiny_engine()
    assert engine.tokenizer is not None
    texts, forms = TEXTS[:3], []
    for text in texts:
        head = engine.tokenizer.encode(ECHO_BEFORE + text + ECHO_BETWEEN)
        whole = engine.tokenizer.encode(ECHO_BEFORE + text + ECHO_BETWEEN + text)
        assert engine.tokenizer.decode(whole[len(head) :]) == text
        forms.append(EmbeddedText(whole, len(head)))
    vectors = engine.embed(texts, pooling, echo=True)
    np.testing.assert_array_equal(vectors, engine.embed(forms, pooling))
    assert np.abs(vectors - engine.embed(texts, pooling)).max() > 0.01
    once = engine.embed([EmbeddedText(form.ids, 0) for form in forms], pooling)
    assert (pooling == "last") == np.allclose(vectors, once, atol=1e-6)


def test_tokens_that_are_not_pooled_may_be_found_in_the_cache(tiny_engine: Callable[..., Engine]) -> None:
    prompt = "Instruct: given a question, retrieve the passages that answer it, and nothing else.\nQuery: "
    expected = [tiny_engine().embed([text], prompt=prompt, include_prompt=False)[0] for text in TEXTS]
    for options in STEPS:
        engine = tiny_engine(**options)
        vectors = engine.embed(TEXTS, prompt=prompt, include_prompt=False)
        np.testing.assert_allclose(vectors, expected, atol=1e-6)
        assert engine.stats.found_tokens >= 4 * 32


def test_a_text_of_nothing_but_its_prompt_has_no_vector(tiny_engine: Callable[..., Engine]) -> None:
    engine = tiny_engine()
    engine.add(EmbedRequest(request_id=0, token_ids=[5, 6], vector=VectorRequest(form=VectorForm(), pooled_from=2)))
    (answer,) = finish(engine)
    assert answer.error is not None
    assert answer.error.code == "nonfinite"


def finish(engine: Engine) -> list[Finished]:
    finished = []
    while engine.has_work:
        finished += engine.step()
    return finished


MANY = [[5 + (7 * i + j) % 590 for j in range(8 + 9 * i)] for i in range(4)]


@pytest.mark.parametrize(("pooling", "n"), [("mean", 1), ("last", 2), ("weighted_mean", 2)])
def test_a_generation_and_its_prompts_vector_come_from_one_pass(
    tiny_engine: Callable[..., Engine], block_bytes: int, pooling: str, n: int
) -> None:
    params = SamplingParams(max_new_tokens=40, temperature=1.0, n=n, ignore_eos=True)
    expected = tiny_engine().generate(MANY, params, keys=range(len(MANY)))
    vectors = tiny_engine().embed(MANY, pooling)
    crowded = {"kv_cache_bytes": 5 * block_bytes}
    for options, new_tokens in (({}, 3), ({"step_tokens": 16}, 3), (crowded, 40)):
        engine = tiny_engine(**options)
        params = replace(params, max_new_tokens=new_tokens)
        for i, prompt in enumerate(MANY):
            wanted = VectorRequest(form=VectorForm(pooling=pooling))
            engine.add(GenerateRequest(request_id=i, token_ids=prompt, params=params, key=i, vector=wanted))
        answers = sorted(finish(engine), key=lambda answer: (answer.request_id, answer.sample))
        assert [answer.token_ids for answer in answers] == [output.token_ids[:new_tokens] for output in expected]
        assert all((answer.vector is None) == (answer.sample > 0) for answer in answers)
        found = [answer.vector for answer in answers if answer.vector is not None]
        np.testing.assert_allclose(found, vectors, atol=1e-6)
        if options is crowded:
            assert engine.stats.preemptions > 0
        elif not options:
            assert engine.stats.prefill_tokens == sum(map(len, MANY)), "each prompt was computed once"


def test_a_step_that_fails_after_its_vectors_leaves_them_to_be_made_again(
    tiny_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tiny_engine().embed(MANY)
    engine = tiny_engine(step_tokens=64)
    params = SamplingParams(max_new_tokens=2)
    for i, prompt in enumerate(MANY):
        vector = VectorRequest(form=VectorForm())
        engine.add(GenerateRequest(request_id=i, token_ids=prompt, params=params, vector=vector))
        engine.add(EmbedRequest(request_id=100 + i, token_ids=prompt))
    logits, calls = engine.decoder.logits, 0

    def failing(hidden: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls in (1, 3):
            raise RuntimeError("out of memory")
        return logits(hidden)

    monkeypatch.setattr(engine.decoder, "logits", failing)
    answers: dict[int, Finished] = {}
    while engine.has_work:
        try:
            answers |= {answer.request_id: answer for answer in engine.step()}
        except RuntimeError:
            continue
    assert calls > 3
    for i in range(len(MANY)):
        for request_id in (i, 100 + i):
            found = answers[request_id].vector
            assert found is not None
            np.testing.assert_allclose(found, expected[i], atol=1e-6)


def test_a_prompt_whose_vector_is_none_fails_its_generation(
    tiny_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine()
    shaped = RowError("nonfinite", "the vector's length is 0.0")
    monkeypatch.setattr("workers.engine.vectors.shaped", lambda *_: shaped)
    params = SamplingParams(max_new_tokens=3, n=2)
    engine.add(GenerateRequest(request_id=0, token_ids=[5, 6], params=params, vector=VectorRequest(form=VectorForm())))
    engine.add(GenerateRequest(request_id=1, token_ids=[5, 6], params=SamplingParams(max_new_tokens=3)))
    answers = finish(engine)
    assert [(answer.request_id, answer.error) for answer in answers if answer.error] == [(0, shaped)]
    assert [answer.request_id for answer in answers if not answer.error] == [1]


@cache
def routed_model(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def routers(path: Path, ids: list[int], pooling: str) -> Any:
    """Mixtral's router logits, as transformers gives them -> the pooled softmax of all layers."""
    with torch.inference_mode():
        logits = routed_model(path)(torch.tensor([ids]), output_router_logits=True).router_logits
    scores = torch.cat([layer.double().softmax(dim=-1) for layer in logits], dim=1)  # [T, R]
    weights = {"mean": torch.ones(len(ids)), "last": torch.eye(len(ids))[-1]}[pooling].double()
    return (weights / weights.sum() @ scores).numpy()


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_what_routers_say_is_an_embedding_beside_the_hidden_states(
    tiny_engine: Callable[..., Engine], tiny_model: Callable[..., Path], pooling: str
) -> None:
    prompts, weight = MANY[:4], 0.5
    hidden = tiny_engine("mixtral").embed(prompts, pooling)
    routing = np.array([routers(tiny_model("mixtral"), prompt, pooling) for prompt in prompts])
    routing /= np.linalg.norm(routing, axis=1, keepdims=True)
    for options in STEPS:
        vectors = tiny_engine("mixtral", **options).embed(prompts, pooling, routing_weight=weight)
        assert vectors.shape == (4, 60 + 4 * 5)
        expected = np.concatenate([hidden, np.sqrt(weight) * routing], axis=1) / np.sqrt(1 + weight)
        np.testing.assert_allclose(vectors, expected, atol=1e-5)
        cosines = (hidden @ hidden.T + weight * routing @ routing.T) / (1 + weight)
        np.testing.assert_allclose(vectors @ vectors.T, cosines, atol=1e-5)


def test_routing_of_a_model_without_experts_is_refused(tiny_engine: Callable[..., Engine]) -> None:
    with pytest.raises(ValueError, match=r"routing_weight: 0\.5, and the model has no experts"):
        tiny_engine().embed(TEXTS, routing_weight=0.5)
