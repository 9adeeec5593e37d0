"""What a model is said to take before it is loaded is what its checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from workers.decoder.checkpoint import load_checkpoint
from workers.decoder.config import ExpertsConfig
from workers.forecast import model_cost


@pytest.mark.parametrize(
    "model_type", ["llama", "mixtral", "olmoe", "qwen2_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "granitemoe"]
)
def test_the_weights_are_counted_as_they_are(model_type: str, tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model(model_type, tokenizer=False)
    cost = model_cost(load_checkpoint(folder).config)
    tensors = load_file(folder / "model.safetensors")
    counted = {name: t for name, t in tensors.items() if t.ndim > 1 and not name.endswith("bias")}
    assert cost.weights == sum(t.numel() for name, t in counted.items() if "shared_expert_gate" not in name)


def test_a_token_meets_its_own_experts_and_the_shared_ones(tiny_model: Callable[..., Path]) -> None:
    config = load_checkpoint(tiny_model("qwen2_moe", tokenizer=False)).config
    cost, idle = model_cost(config), 0
    for layer in config.layers:
        assert isinstance(layer.feed_forward, ExpertsConfig)
        experts = layer.feed_forward
        idle += (experts.router.num_experts - experts.router.top_k) * 3 * config.hidden_width * experts.expert.width
    assert cost.weights - 2 * cost.output_weights - cost.weights_a_token == idle
