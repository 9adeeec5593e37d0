"""Seeded random checkpoints give transformers' answers in float32, however their tokens are cut into steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from workers.decoder.kernels import native

CASES: dict[str, dict[str, Any]] = {
    "llama, grouped queries": {"model_type": "llama"},
    "llama, multi-head, tied": {"model_type": "llama", "num_key_value_heads": 6, "tie_word_embeddings": True},
    "llama, multi-query, biases": {
        **{"model_type": "llama", "num_key_value_heads": 1, "num_attention_heads": 5, "head_dim": 14},
        **{"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3},
    },
    "llama, linear scaling": {
        "model_type": "llama",
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 5e3, "factor": 4.0},
    },
    "llama 3 scaling": {
        "model_type": "llama",
        "head_dim": 16,
        "rope_parameters": {
            **{"rope_type": "llama3", "rope_theta": 1e3, "factor": 8.0, "low_freq_factor": 1.0},
            **{"high_freq_factor": 4.0, "original_max_position_embeddings": 32},
        },
    },
    "mistral, window": {"model_type": "mistral", "sliding_window": 21},
    "mistral, no window": {"model_type": "mistral", "sliding_window": None, "tie_word_embeddings": True},
    "mixtral": {"model_type": "mixtral"},
    "mixtral, window, top 3 of 7": {
        **{"model_type": "mixtral", "sliding_window": 17, "num_local_experts": 7, "num_experts_per_tok": 3},
    },
}
LENGTHS = (1, 2, 17, 40, 97)


def prompt_of(length: int) -> list[int]:
    return torch.randint(3, 603, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def differ(got: Tensor, wanted: Tensor) -> float:
    """The largest difference relative to the largest logit."""
    return float((got - wanted).abs().max() / wanted.abs().max())


def same(got: Tensor, wanted: Tensor) -> bool:
    """Equal to the bit where the C kernels run; torch's own products round by the number of rows."""
    return torch.equal(got, wanted) if native.available() else differ(got, wanted) < 1e-5


@pytest.fixture(scope="module", params=CASES)
def model(request: pytest.FixtureRequest, tiny_model: Callable[..., Path]) -> Path:
    return tiny_model(**CASES[request.param], tokenizer=False)


def test_logits_equal_the_reference(model: Path, paged: Any, reference: Any) -> None:
    sequences = paged(model)
    for length in LENGTHS:
        prompt = prompt_of(length)
        with torch.inference_mode():
            wanted = reference(model)(torch.tensor([prompt])).logits[0]
        assert differ(sequences.logits(prompt), wanted) < 1e-4, length


def test_greedy_text_equals_the_reference_for_32_tokens(model: Path, paged: Any, reference: Any) -> None:
    prompts = [prompt_of(length) for length in (1, 17, 40)]
    wanted = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        generated = reference(model).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=32,
            min_new_tokens=32,
            do_sample=False,
            eos_token_id=None,
        )
        wanted.append(generated[0, len(prompt) :].tolist())
    assert paged(model).greedy(prompts, 32) == wanted
    assert [paged(model, seed=1).greedy([prompt], 32)[0] for prompt in prompts] == wanted


def test_a_prompt_in_chunks_and_token_by_token_gives_what_it_gives_whole(model: Path, paged: Any) -> None:
    sequences = paged(model)
    prompt = prompt_of(50)
    whole = sequences.logits(prompt)
    for chunk in (1, 7, 16, 33):
        assert same(sequences.logits(prompt, chunk=chunk), whole), chunk


def test_a_sequence_gives_the_same_alone_and_beside_others(model: Path, paged: Any) -> None:
    prompts = [prompt_of(length) for length in LENGTHS]
    together = paged(model).step(dict(enumerate(prompts)))
    alone = paged(model, seed=1)
    for i, prompt in enumerate(prompts):
        assert same(together[i], alone.step({i: prompt})[i]), len(prompt)


def test_a_step_without_tokens_is_legal(model: Path, paged: Any) -> None:
    assert paged(model).step({0: []})[0].shape == (0, 60)
