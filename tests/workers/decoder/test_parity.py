"""Seeded random checkpoints give transformers' answers in float32, however their tokens are cut into steps.

parity/MODEL_TYPE.yaml says for an architecture in the words of transformers' configuration: `settings`, what tests'
`tiny_model` sets for it above what it sets for all; `without`, which of those it leaves out; `cases`, by name what each
sets above that. A case's `prompt_lengths` is no setting: the lengths that it is tried with, where not the usual ones.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from workers.decoder.kernels import native

PARITY = Path(__file__).parent / "parity"
LENGTHS = (1, 2, 17, 40, 97)


def prompt_of(length: int) -> list[int]:
    return torch.randint(3, 603, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def differ(got: Tensor, wanted: Tensor) -> float:
    """The largest difference relative to the largest logit."""
    return float((got - wanted).abs().max() / wanted.abs().max())


def same(got: Tensor, wanted: Tensor) -> bool:
    """Equal to the bit where the C kernels run; torch's own products round by the number of rows."""
    return torch.equal(got, wanted) if native.available() else differ(got, wanted) < 1e-5


def parity_cases() -> dict[str, tuple[str, dict[str, Any]]]:
    """Model type and settings by "MODEL_TYPE: CASE"."""
    found = {}
    for file in sorted(PARITY.glob("*.yaml")):
        cases = yaml.safe_load(file.read_text(encoding="utf-8"))["cases"]
        found |= {f"{file.stem}: {name}": (file.stem, settings) for name, settings in cases.items()}
    return found


CASES = parity_cases()


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def lengths(case: str) -> list[int]:
    return list(CASES[case][1].get("prompt_lengths", LENGTHS))


@pytest.fixture(scope="module")
def model(case: str, tiny_model: Callable[..., Path]) -> Path:
    model_type, settings = CASES[case]
    settings = {name: value for name, value in settings.items() if name != "prompt_lengths"}
    return tiny_model(model_type, tokenizer=False, **settings)


def test_logits_equal_the_reference(model: Path, lengths: list[int], paged: Any, reference: Any) -> None:
    sequences = paged(model)
    for length in lengths:
        prompt = prompt_of(length)
        with torch.no_grad():
            wanted = reference(model)(torch.tensor([prompt])).logits[0]
        assert differ(sequences.logits(prompt), wanted) < 1e-4, length


def test_greedy_text_equals_the_reference_for_32_tokens(
    model: Path, lengths: list[int], paged: Any, reference: Any, most_likely: Any
) -> None:
    prompts = [prompt_of(length) for length in lengths[::2]]
    texts = paged(model).greedy(prompts, 32)
    for prompt, text in zip(prompts, texts, strict=True):
        assert len(text) == 32
        if rotates_by_length(reference(model)):
            assert generated(reference(model), prompt, 32) == text
        else:
            assert most_likely(reference(model), prompt, text)[:-1] == text
    assert paged(model, seed=1).greedy(prompts[-1:], 32) == texts[-1:]


def rotates_by_length(reference: Any) -> bool:
    """Whether transformers turns all positions another way when a sequence grows."""
    rotation = getattr(reference.config, "rope_parameters", None) or {}
    return rotation.get("rope_type") in ("dynamic", "longrope")


def generated(reference: Any, prompt: list[int], num_tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    found = reference.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
    )
    return found[0, len(prompt) :].tolist()


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
