"""Layers with the Sparse Transformer's patterns, from a rule to greedy text, in caches too small for what is freed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.errors import UserError
from workers.decoder.attention import AttentionMetadata
from workers.decoder.attention_choice import with_attention
from workers.decoder.checkpoint import load_checkpoint
from workers.decoder.kernels import native
from workers.decoder.model import Decoder
from workers.engine import Engine, SamplingParams

RULES: dict[str, list[dict[str, Any]]] = {
    "strided, alternating": [{"pattern": "strided", "stride": 12, "form": "alternating"}],
    "strided, merged and divided": [
        {"layers": "even", "pattern": "strided", "stride": 12},
        {"layers": "odd", "pattern": "strided", "stride": 9, "form": "divided"},
    ],
    "fixed, divided, one layer full": [
        {"pattern": "fixed", "block": 32, "summary": 5, "form": "divided", "distinct": True},
        {"layers": "2", "pattern": "full"},
    ],
    "fixed and sliding": [
        {"layers": "0-1", "pattern": "fixed", "block": 32, "summary": 4},
        {"layers": "2,3", "pattern": "sliding", "window": 20},
    ],
    "fixed, alternating": [{"pattern": "fixed", "block": 20, "summary": 3, "form": "alternating"}],
}
NUM_LAYERS, NUM_HEADS = 4, 6


def sees(rules: list[dict[str, Any]], layer: int, head: int, i: int) -> set[int]:
    """The definition, for rules whose layers are all, even, odd, or single digits and ranges of them."""
    turns = [0] * len(rules)
    for index in range(NUM_LAYERS):
        winner = max(
            n
            for n, rule in enumerate(rules)
            if (said := rule.get("layers", "all")) == "all"
            or (said == "even" and index % 2 == 0)
            or (said == "odd" and index % 2 == 1)
            or (said[0].isdigit() and index in (range(0, 2) if said == "0-1" else [int(x) for x in said.split(",")]))
        )
        turn, turns[winner] = turns[winner], turns[winner] + 1
        if index == layer:
            break
    rule, past = rules[winner], range(i + 1)
    if rule["pattern"] == "full":
        return set(past)
    if rule["pattern"] == "sliding":
        return {j for j in past if j > i - rule["window"]}
    form, end = rule.get("form", "merged"), rule.get("block", 0)
    if rule["pattern"] == "strided":
        first = {j for j in past if j >= i - rule["stride"]}
        second = {j for j in past if (i - j) % rule["stride"] == 0}
    else:
        if rule.get("distinct"):
            end -= (head // 2 if form == "divided" else head) % (end // rule["summary"]) * rule["summary"]
        first = {j for j in past if j // rule["block"] == i // rule["block"]}
        second = {j for j in past if end - rule["summary"] <= j % rule["block"] < end}
    part = {"merged": 2, "alternating": turn % 2, "divided": head % 2}[form]
    return (first, second, first | second)[part] or {i}


def reference_logits(model: Any, tokens: list[int], rules: list[dict[str, Any]]) -> Tensor:
    """transformers' logits with each layer's own dense mask."""
    length = len(tokens)
    hooks = []
    for index, layer in enumerate(model.model.layers):
        mask = torch.full((1, NUM_HEADS, length, length), torch.finfo(torch.float32).min)
        for head in range(NUM_HEADS):
            for i in range(length):
                mask[0, head, i, sorted(sees(rules, index, head, i))] = 0.0
        hooks.append(
            layer.self_attn.register_forward_pre_hook(
                lambda _, args, kwargs, mask=mask: (args, kwargs | {"attention_mask": mask}), with_kwargs=True
            )
        )
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([tokens])).logits[0]
    for hook in hooks:
        hook.remove()
    return logits


def prompt_of(length: int) -> list[int]:
    return torch.randint(3, 603, (length,), generator=torch.Generator().manual_seed(length)).tolist()


@pytest.fixture(scope="module")
def path(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama", tokenizer=False)


@pytest.mark.parametrize("rules", RULES.values(), ids=list(RULES))
def test_logits_are_those_of_a_dense_mask_however_the_prompt_is_cut(path: Path, rules: list[dict[str, Any]]) -> None:
    from transformers import AutoModelForCausalLM

    decoder = Decoder.load(with_attention(load_checkpoint(path), rules), dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = prompt_of(150)
    wanted = reference_logits(model, tokens, rules)
    engines = [Engine(decoder, eos_ids=frozenset(), step_tokens=step) for step in (512, 37)]
    params = SamplingParams(max_new_tokens=1, temperature=0.0, ignore_eos=True, logprobs=True)
    for length in (1, 13, 40, 97, 150):
        logprobs = wanted[length - 1].log_softmax(-1)
        for engine in engines:
            [output] = engine.generate([tokens[:length]], params)
            assert output.token_ids == [int(logprobs.argmax())]
            assert abs(output.logprobs[0] - float(logprobs.max())) < 1e-4 * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("rules", RULES.values(), ids=list(RULES))
def test_all_logits_and_32_greedy_tokens_are_those_of_a_dense_mask(path: Path, rules: list[dict[str, Any]]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    decoder = Decoder.load(with_attention(load_checkpoint(path), rules), dtype="float32")
    prompt = prompt_of(70)
    params = SamplingParams(max_new_tokens=32, temperature=0.0, ignore_eos=True)
    [output] = Engine(decoder, eos_ids=frozenset()).generate([prompt], params)
    tokens = prompt + output.token_ids
    wanted = reference_logits(model, tokens, rules)
    # Each of our tokens is the reference's choice after those before it, so the reference's own text is the same.
    assert output.token_ids == wanted[len(prompt) - 1 : -1].argmax(-1).tolist()
    got = whole_logits(decoder, tokens)
    assert float((got - wanted).abs().max() / wanted.abs().max()) < 1e-4


def whole_logits(decoder: Decoder, tokens: list[int]) -> Tensor:
    """[T, V] of one sequence in one step."""
    at = torch.arange(len(tokens))
    blocks = -(-len(tokens) // 16)
    metadata = AttentionMetadata(
        query_start=torch.tensor([0, len(tokens)], dtype=torch.int32),
        context_lens=torch.tensor([len(tokens)], dtype=torch.int32),
        block_table=torch.arange(blocks, dtype=torch.int32)[None],
        slots=at,
    )
    groups = len(decoder.groups)
    pools = decoder.new_pools([blocks] * groups, 16)
    return decoder.logits(decoder.forward(torch.tensor(tokens), at, [metadata] * groups, pools))


@pytest.mark.parametrize("rules", RULES.values(), ids=list(RULES))
def test_a_small_cache_and_neighbours_change_no_text(path: Path, rules: list[dict[str, Any]]) -> None:
    prompts = [prompt_of(length) for length in (3, 5, 8, 4, 70)]
    params = SamplingParams(max_new_tokens=50, temperature=0.0, ignore_eos=True)

    def make(**options: Any) -> Engine:
        return Engine.from_checkpoint(path, dtype="float32", attention=rules, **options)

    roomy = make()
    alone = [roomy.generate([prompt], params)[0].token_ids for prompt in prompts]
    blocks = sum(roomy.decoder.block_bytes(g, 16) for g in range(len(roomy.decoder.groups)))
    budgets = (make(kv_cache_bytes=num * blocks, step_tokens=24) for num in range(8, 64))
    small = next(engine for engine in budgets if engine._scheduler.tables.could_ever_hold(70 + 49))
    together = [output.token_ids for output in small.generate(prompts, params)]
    assert together == alone or not native.available()
    tables = small._scheduler.tables
    wanted = [sum(tables.blocks_needed(g, len(prompt) + 49) for prompt in prompts) for g in range(len(tables.groups))]
    assert any(cache.num_blocks < most for cache, most in zip(small.cache.groups, wanted, strict=True))


def test_a_long_sequence_fits_a_cache_that_could_not_hold_all_of_it(path: Path) -> None:
    def most_blocks(rules: list[dict[str, Any]]) -> list[int]:
        engine = Engine.from_checkpoint(path, dtype="float32", attention=rules, step_tokens=32, max_context=480)
        params = SamplingParams(max_new_tokens=60, temperature=0.0, ignore_eos=True)
        allocators = engine._scheduler.tables.allocators
        most = [0] * len(allocators)
        from workers.engine.request import GenerateRequest

        engine.add(GenerateRequest(request_id=0, token_ids=prompt_of(400), params=params, key=0))
        while engine.has_work:
            engine.step()
            most = [max(m, a.num_blocks - a.num_free) for m, a in zip(most, allocators, strict=True)]
        needs = [engine._scheduler.tables.blocks_needed(g, 459) for g in range(len(most))]
        assert all(held <= need for held, need in zip(most, needs, strict=True))
        return most

    assert most_blocks([{"pattern": "full"}]) == [29]  # 459 positions in blocks of 16
    [fixed] = most_blocks([{"pattern": "fixed", "block": 64, "summary": 8}])
    assert fixed <= 7 + 4 + 2  # a block of every 64 positions, one such block, and a step
    [sliding] = most_blocks([{"pattern": "sliding", "window": 40}])
    assert sliding <= 6
    assert most_blocks([{"pattern": "strided", "stride": 16}]) == [29]


@pytest.mark.parametrize(
    ("rule", "line"),
    [
        ({"layers": "2-9", "pattern": "full"}, "no layer 9 in the model, its last is 3"),
        ({"pattern": "fixed", "block": 8, "summary": 9}, "summary of 9"),
        ({"pattern": "sliding"}, "needs window"),
        ({"pattern": "full", "window": 3}, "window is not for pattern full"),
        ({"pattern": "full", "layers": "3-1"}, "layers must be"),
        ({"pattern": "full", "windows": 3}, "unknown key 'windows'"),
        ({"pattern": "dense"}, "'dense' is not known"),
        ({"pattern": "sliding", "window": 0}, "at least 1"),
    ],
)
def test_a_rule_that_does_not_fit_is_refused_in_one_line(path: Path, rule: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line) as refused:
        Engine.from_checkpoint(path, dtype="float32", attention=[rule])
    assert "\n" not in str(refused.value)
