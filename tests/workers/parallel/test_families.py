"""Every architecture with experts gives over two ranks, to the bit, what it gives in one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from workers.forecast import expert_layers
from workers.parallel.placement import round_robin

PARITY = Path(__file__).parents[1] / "decoder" / "parity"
DENSE_BETWEEN = {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}


def mixtures() -> list[str]:
    found = []
    for file in sorted(PARITY.glob("*.yaml")):
        settings = yaml.safe_load(file.read_text()).get("settings", {})
        if {"num_experts", "num_local_experts", "n_routed_experts"} & set(settings):
            found.append(file.stem)
    return found


@pytest.mark.parametrize("model_type", mixtures())
def test_a_model_of_each_family_gives_the_same_over_two_ranks(
    gang: Callable[..., Any], tiny_model: Callable[..., Path], model_type: str
) -> None:
    from gang_ranks import answers

    model = tiny_model(model_type, **(DENSE_BETWEEN if model_type == "qwen2_moe" else {}))
    layers, num_experts = expert_layers(model)
    if model_type in ("qwen2_moe", "deepseek_v2", "deepseek_v3"):
        assert 0 < len(layers) < 6, "some are dense"
    generator = torch.Generator().manual_seed(1)
    task = {
        "kind": "answers",
        "model": str(model),
        "prompts": [torch.randint(3, 600, (n,), generator=generator).tolist() for n in (30, 4, 11, 17)],
        "params": [{"ignore_eos": True, "max_new_tokens": 5, "temperature": temperature} for temperature in (0.0, 1.0)],
        "shares": [0, 1, 0, 1, 0, 0, 1, 0],
        "out": "",
    }
    alone = answers(task, None)
    ranks = gang(task, round_robin(layers, num_experts, 2)).results()
    assert {key: one for rank in ranks for key, one in rank["found"].items()} == alone["found"]
