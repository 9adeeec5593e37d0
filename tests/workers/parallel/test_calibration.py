"""A sample's loads are what the routers chose, whatever the steps in which it ran."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from workers.decoder.model import Decoder
from workers.parallel.calibration import listening, run_sequences
from workers.parallel.loads import ExpertLoads

SEQUENCES = [
    torch.randint(3, 603, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (70, 1, 500, 64, 500, 130)
]


@pytest.fixture(scope="module")
def decoder(tiny_model: Callable[..., Path]) -> Decoder:
    return Decoder.load(tiny_model("mixtral"), dtype="float32")


def measured(decoder: Decoder, sequences: list[list[int]]) -> ExpertLoads:
    loads = ExpertLoads(layers=(0, 1, 2, 3), num_experts=5)
    with listening(decoder, loads.add):
        run_sequences(decoder, sequences)
    return loads


def test_loads_are_what_transformers_routers_choose(decoder: Decoder, tiny_model: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model("mixtral"), dtype=torch.float32).eval()
    wanted = np.zeros((4, 5), dtype=np.int64)
    with torch.inference_mode():
        for sequence in SEQUENCES:
            routers = model(torch.tensor([sequence]), output_router_logits=True).router_logits
            for layer, logits in enumerate(routers):
                wanted[layer] += logits.topk(2).indices.flatten().bincount(minlength=5).numpy()
    loads = measured(decoder, SEQUENCES)
    assert np.array_equal(loads.counts, wanted)
    assert (loads.coactivations.sum(axis=(1, 2)) == 2 * sum(map(len, SEQUENCES))).all()


def test_it_makes_no_difference_how_sequences_are_packed(decoder: Decoder) -> None:
    together, alone = measured(decoder, [[], *SEQUENCES]), measured(decoder, [])
    for sequence in SEQUENCES:
        alone.merge(measured(decoder, [sequence]))
    assert np.array_equal(together.coactivations, alone.coactivations)


def test_listening_leaves_the_decoder_as_it_was(decoder: Decoder) -> None:
    plain = decoder.dispatcher
    heard: list[tuple[int, tuple[int, ...]]] = []
    with listening(decoder, lambda layer, ids: heard.append((layer, ids.shape))):
        run_sequences(decoder, [SEQUENCES[0]])
    assert heard == [(layer, (70, 2)) for layer in range(4)]
    assert decoder.dispatcher is plain

    def fail(layer: int, ids: Any) -> None:
        raise RuntimeError("listener")

    with pytest.raises(RuntimeError, match="listener"), listening(decoder, fail):
        run_sequences(decoder, [SEQUENCES[0]])
    assert decoder.dispatcher is plain


def test_a_sequence_beyond_the_context_is_refused(decoder: Decoder) -> None:
    with pytest.raises(ValueError, match="513 tokens, where the context holds 512"):
        run_sequences(decoder, [[5] * 513])
