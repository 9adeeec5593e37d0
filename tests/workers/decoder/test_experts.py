"""Experts as checkpoints have them: in MXFP4, held in part, listened to; and configurations that make no sense."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.errors import UserError
from workers.decoder.checkpoint import load_checkpoint
from workers.decoder.experts import Experts
from workers.decoder.kernels import native
from workers.decoder.model import Decoder
from workers.decoder.mxfp4 import widen
from workers.decoder.safetensors_files import SafetensorsFiles

PROMPT = [5, 300, 17, 42, 602, 3, 3, 99]
GPT_OSS = {"hidden_size": 64, "intermediate_size": 96}

LONGROPE = {"type": "longrope", "long_factor": [1.0] * 5, "short_factor": [1.0] * 5, "long_mscale": 1.2}


def in_mxfp4(folder: Path, published: Path, widened: Path) -> None:
    """gpt-oss in `folder` with other experts: `published` in MXFP4, `widened` as transformers makes it."""
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    packed = dict(tensors)
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, into, out = packed.pop(name).shape
        blocks = torch.randint(0, 256, (experts, out, into // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(122, 125, (experts, out, into // 32), generator=generator, dtype=torch.uint8)
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        tensors[name] = widen(blocks, scales, torch.float32).mT.contiguous()
    for target, held in ((published, packed), (widened, tensors)):
        shutil.copytree(folder, target)
        save_file(held, target / "model.safetensors")
    rewrite_config(published, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})


def rewrite_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def differ(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


def test_published_mxfp4_experts_answer_as_transformers_does_with_their_numbers(
    tmp_path: Path, tiny_model: Callable[..., Path], paged: Any, reference: Any
) -> None:
    in_mxfp4(tiny_model("gpt_oss", tokenizer=False, **GPT_OSS), tmp_path / "published", tmp_path / "widened")
    got = paged(tmp_path / "published").logits(PROMPT)
    assert torch.equal(got, paged(tmp_path / "widened").logits(PROMPT))
    with torch.inference_mode():
        assert differ(got, reference(tmp_path / "widened")(torch.tensor([PROMPT])).logits[0]) < 1e-4


def test_mxfp4_is_read_an_expert_at_a_time(
    tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_mxfp4(tiny_model("gpt_oss", tokenizer=False, **GPT_OSS), tmp_path / "published", tmp_path / "widened")
    largest = 0
    original = SafetensorsFiles.read

    def read(self: SafetensorsFiles, source: Any, dtype: torch.dtype) -> Tensor:
        nonlocal largest
        piece = original(self, source, dtype)
        if source.scales is not None:
            largest = max(largest, piece.numel())
        return piece

    monkeypatch.setattr(SafetensorsFiles, "read", read)
    Decoder.load(tmp_path / "published")
    assert largest == 96 * 64


def test_a_rank_holds_the_biases_of_its_own_experts(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("gpt_oss", tokenizer=False, **GPT_OSS)
    whole, held = Decoder.load(folder), [[3, 1], [0, 2], [4, 4], []]
    for all_of_them, part, experts in zip(whole.blocks, Decoder.load(folder, experts=held).blocks, held, strict=True):
        one, other = all_of_them.feed_forward, part.feed_forward
        assert isinstance(one, Experts)
        assert isinstance(other, Experts)
        assert other.gate_up.experts == tuple(experts)
        if experts:
            assert one.gate_up_bias is not None
            assert one.down_bias is not None
            assert torch.equal(other.gate_up_bias, one.gate_up_bias[experts])
            assert torch.equal(other.down_bias, one.down_bias[experts])


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3"])
def test_a_listener_hears_what_each_router_says(
    model_type: str, tiny_model: Callable[..., Path], paged: Any, reference: Any
) -> None:
    folder = tiny_model(model_type, tokenizer=False)
    heard: dict[int, Tensor] = {}
    sequences = paged(folder)
    quiet = sequences.step({0: PROMPT})[0]
    sequences.listener = heard.__setitem__
    assert torch.equal(sequences.step({1: PROMPT})[1], quiet)
    with torch.inference_mode():
        wanted = reference(folder)(torch.tensor([PROMPT]), output_router_logits=True).router_logits
    layers = sequences.decoder.config.layers
    assert list(heard) == [i for i, layer in enumerate(layers) if hasattr(layer.feed_forward, "router")]
    for got, logits in zip(heard.values(), wanted, strict=True):
        assert differ(got, logits) < 1e-4


@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3"])
def test_latent_attention_caches_a_latent_and_one_rotated_key_a_token(
    model_type: str, tiny_model: Callable[..., Path]
) -> None:
    decoder = Decoder.load(tiny_model(model_type, tokenizer=False), dtype="float32")
    assert len(decoder.groups) == 1
    columns = 36 + 6
    if native.available():  # whose rows are whole panels
        columns = -(-columns // native.panel_columns()) * native.panel_columns()
    assert decoder.block_bytes(0, 16) == 4 * 16 * columns * 4  # layers, tokens, columns, bytes


@pytest.mark.parametrize(
    ("model_type", "changes", "complaint"),
    [
        ("olmoe", {"num_experts_per_tok": 6}, "a token can't choose 6 of 5 experts"),
        ("qwen2_moe", {"mlp_only_layers": [-1]}, "mlp_only_layers must be a list of whole numbers"),
        ("gpt_oss", {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types must be 4 times"),
        ("gpt_oss", {"quantization_config": {"quant_method": "awq"}}, "weights quantized by 'awq' can't be read"),
        ("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}}, "weights quantized by 'fp8' can't be read"),
        ("deepseek_v3", {"scoring_func": "tanh"}, r"scoring_func 'tanh' is not supported \(sigmoid"),
        ("deepseek_v3", {"topk_method": "greedy"}, r"topk_method 'greedy' is not supported \(noaux_tc"),
        ("deepseek_v2", {"topk_method": "best"}, r"topk_method 'best' is not supported \(greedy, group_limited_greedy"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob is not supported"),
        ("deepseek_v2", {"n_group": 3}, "8 experts don't make 3 groups"),
        ("deepseek_v2", {"topk_group": 1}, "too few to choose 3 from"),
        ("deepseek_v2", {"moe_layer_freq": 2}, "moe_layer_freq 2 is not supported, only 1"),
        ("deepseek_v2", {"qk_rope_head_dim": 5}, "rotary positions need an even width"),
        ("granitemoe", {"logits_scaling": 0}, "logits_scaling must be a number other than 0"),
        ("phimoe", {"rope_scaling": LONGROPE | {"short_mscale": 1.1}, "rope_parameters": None}, "short_mscale"),
        ("phimoe", {"num_experts_per_tok": 3}, "num_experts_per_tok must be 2"),
    ],
)
def test_a_configuration_that_can_not_be_run_gets_one_clear_line(
    model_type: str, changes: dict[str, Any], complaint: str, tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    folder = Path(shutil.copytree(tiny_model(model_type, tokenizer=False), tmp_path / "model"))
    rewrite_config(folder, **changes)
    with pytest.raises(UserError, match=complaint) as caught:
        load_checkpoint(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
