"""A rank that is given other experts has just those, as if it had been loaded with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from workers.decoder.checkpoint import load_checkpoint
from workers.decoder.experts import Experts
from workers.decoder.model import Decoder
from workers.decoder.safetensors_files import SafetensorsFiles

BEFORE, AFTER = ((0, 2, 4),) * 4, ((3, 1), (0, 2, 4), (), (4, 3, 2, 1, 0))


def experts_of(decoder: Decoder) -> list[Experts]:
    return [block.feed_forward for block in decoder.blocks if isinstance(block.feed_forward, Experts)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])  # the latter's experts have biases
def test_experts_held_anew_are_those_of_a_rank_that_was_loaded_with_them(
    tiny_model: Callable[..., Path], family: str, dtype: str
) -> None:
    model = tiny_model(family)
    decoder = Decoder.load(model, dtype=dtype, experts=BEFORE)
    decoder.hold(load_checkpoint(model), AFTER)
    wanted = Decoder.load(model, dtype=dtype, experts=AFTER)
    for held, (got, want) in zip(AFTER, zip(experts_of(decoder), experts_of(wanted), strict=True), strict=True):
        assert got.gate_up.experts == got.down.experts == held
        x = torch.randn(2 * len(held), 60, generator=torch.Generator().manual_seed(1)).to(decoder.precision.activations)
        rows = torch.full((len(held),), 2)
        assert torch.equal(got.compute(x, rows), want.compute(x, rows))


def test_a_layers_experts_are_freed_before_others_are_read_and_only_where_they_change(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("mixtral")
    decoder = Decoder.load(model, dtype="float32", experts=BEFORE)
    experts, original, layers = experts_of(decoder), SafetensorsFiles.read, set[int]()

    def read(self: SafetensorsFiles, source: Any, dtype: torch.dtype) -> torch.Tensor:
        layer = int(source.name.split("layers.")[1].split(".")[0])
        assert ".experts." in source.name, "the router stays"
        assert experts[layer].gate_up.nbytes == experts[layer].down.nbytes == 0
        layers.add(layer)
        return original(self, source, dtype)

    monkeypatch.setattr(SafetensorsFiles, "read", read)
    decoder.hold(load_checkpoint(model), AFTER)
    assert layers == {0, 3}, "layer 1 keeps what it has, layer 2 has none now"
