"""GGUF files of mixtures of experts give the logits of the directories whose weights and settings they were made of.

Tensors' names are those of the gguf package's own map; what it doesn't say (row orders, split and stacked tensors,
keys) is done as llama.cpp's converter does it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter
from safetensors.torch import load_file
from torch import Tensor

from pipeline.errors import UserError
from workers.decoder.checkpoint import load_checkpoint

YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 8.0,
    "original_max_position_embeddings": 40,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
}


def common_keys(writer: GGUFWriter, config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    rope = config["rope_parameters"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(1 if "kv_lora_rank" in config else config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    experts = ("num_experts", "num_local_experts", "n_routed_experts")
    writer.add_expert_count(next(config[key] for key in experts if key in config))
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])


def qwen2_keys(writer: GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])


def olmoe_keys(writer: GGUFWriter, config: dict[str, Any]) -> None:
    if config["clip_qkv"] is not None:
        writer.add_clamp_kqv(config["clip_qkv"])


def granite_keys(writer: GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_embedding_scale(config["embedding_multiplier"])
    writer.add_residual_scale(config["residual_multiplier"])
    writer.add_attention_scale(config["attention_multiplier"])
    writer.add_logit_scale(config["logits_scaling"])


def gpt_oss_keys(writer: GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_sliding_window(config["sliding_window"])
    writer.add_expert_feed_forward_length(config["intermediate_size"])


def deepseek_keys(writer: GGUFWriter, config: dict[str, Any], *, compressed: bool = True) -> None:
    """`compressed`: as files are written since llama.cpp keeps latents in its cache."""
    rank, rotated = config["kv_lora_rank"], config["qk_rope_head_dim"]
    key, value = config["qk_nope_head_dim"] + rotated, config["v_head_dim"]
    writer.add_key_length(rank + rotated if compressed else key)
    writer.add_value_length(rank if compressed else value)
    if compressed:
        writer.add_key_length_mla(key)
        writer.add_value_length_mla(value)
    writer.add_kv_lora_rank(rank)
    if config["q_lora_rank"] is not None:
        writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_rope_dimension_count(rotated)
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_group_count(config["n_group"])
    writer.add_expert_group_used_count(config["topk_group"])
    if config["model_type"] == "deepseek_v3":
        writer.add_expert_weights_norm(config["norm_topk_prob"])
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if config["rope_parameters"]["rope_type"] == "yarn":
        writer.add_rope_scaling_yarn_log_mul(0.1 * config["rope_parameters"]["mscale_all_dim"])


def uncompressed_keys(writer: GGUFWriter, config: dict[str, Any]) -> None:
    deepseek_keys(writer, config, compressed=False)


Converted = dict[str, Tensor]  # by the names that gguf's map knows, or has at its end a suffix


def stacked(tensors: Converted, config: dict[str, Any]) -> Converted:
    """Experts of a layer in one tensor, a shared expert's gate in one dimension."""
    found: Converted = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+\.weight)", name):
            experts.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = tensor
        else:
            found[name] = tensor.squeeze(0) if name.endswith("shared_expert_gate.weight") else tensor
    return found | {name: torch.stack([parts[e] for e in sorted(parts)]) for name, parts in experts.items()}


def granite_tensors(tensors: Converted, config: dict[str, Any]) -> Converted:
    found: Converted = {}
    for name, tensor in tensors.items():
        if match := re.search(r"self_attn\.([qk])_proj", name):
            heads = config["num_attention_heads" if match[1] == "q" else "num_key_value_heads"]
            halves = tensor.view(heads, 2, -1, *tensor.shape[1:])
            found[name] = halves.transpose(1, 2).reshape(tensor.shape)
        elif name.endswith("input_linear.weight"):
            gate, up = tensor.chunk(2, dim=1)
            base = name.removesuffix("input_linear.weight")
            found |= {f"{base}experts.gate.weight": gate, f"{base}experts.up.weight": up}
        else:
            found[name] = tensor
    return found


def gpt_oss_tensors(tensors: Converted, config: dict[str, Any]) -> Converted:
    found: Converted = {}
    for name, tensor in tensors.items():
        base, _, kind = name.partition("_proj")
        if name.endswith("gate_up_proj"):
            base = base.removesuffix("gate_up")
            found |= {f"{base}gate_proj.weight": tensor.mT[:, ::2], f"{base}up_proj.weight": tensor.mT[:, 1::2]}
        elif name.endswith("gate_up_proj_bias"):
            base = base.removesuffix("gate_up")
            found |= {f"{base}gate_proj.bias": tensor[:, ::2], f"{base}up_proj.bias": tensor[:, 1::2]}
        elif ".experts.down_proj" in name:
            found[f"{base}_proj.{kind[1:] or 'weight'}"] = tensor if kind else tensor.mT
        else:
            found[f"{name}.weight" if name.endswith("sinks") else name] = tensor
    return found


def deepseek_tensors(tensors: Converted, config: dict[str, Any], *, compressed: bool = True) -> Converted:
    found: Converted = {}
    for name, tensor in stacked(tensors, config).items():
        if compressed and name.endswith("kv_b_proj.weight"):
            heads = tensor.view(config["num_attention_heads"], -1, config["kv_lora_rank"])
            key, value = heads.split((config["qk_nope_head_dim"], config["v_head_dim"]), dim=1)
            found |= {name.replace("kv_b", "k_b"): key.mT, name.replace("kv_b", "v_b"): value}
        else:
            found[name.replace("e_score_correction_bias", "e_score_correction.bias")] = tensor
    return found


def uncompressed_tensors(tensors: Converted, config: dict[str, Any]) -> Converted:
    return deepseek_tensors(tensors, config, compressed=False)


def no_keys(writer: GGUFWriter, config: dict[str, Any]) -> None:
    pass


CASES: dict[str, tuple[MODEL_ARCH, Any, Any, str, dict[str, Any]]] = {
    "OLMoE": (MODEL_ARCH.OLMOE, olmoe_keys, stacked, "olmoe", {"clip_qkv": 1.0}),
    "Qwen2-MoE": (MODEL_ARCH.QWEN2MOE, qwen2_keys, stacked, "qwen2_moe", {}),
    "Qwen3-MoE": (MODEL_ARCH.QWEN3MOE, no_keys, stacked, "qwen3_moe", {"rope_parameters": YARN}),
    "DeepSeek-V2": (MODEL_ARCH.DEEPSEEK2, deepseek_keys, deepseek_tensors, "deepseek_v2", {}),
    "DeepSeek-V2, plain query, as files once were": (
        *(MODEL_ARCH.DEEPSEEK2, uncompressed_keys, uncompressed_tensors, "deepseek_v2"),
        {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "topk_method": "greedy"},
    ),
    "DeepSeek-V3, YaRN": (
        *(MODEL_ARCH.DEEPSEEK2, deepseek_keys, deepseek_tensors, "deepseek_v3"),
        {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}},
    ),
    "gpt-oss": (
        *(MODEL_ARCH.GPT_OSS, gpt_oss_keys, gpt_oss_tensors, "gpt_oss"),
        {"rope_parameters": YARN | {"truncate": False}, "hidden_size": 64, "intermediate_size": 96},
    ),
    "Granite-MoE": (MODEL_ARCH.GRANITE_MOE, granite_keys, granite_tensors, "granitemoe", {}),
    "Phi-MoE": (MODEL_ARCH.PHIMOE, no_keys, stacked, "phimoe", {"attention_bias": True, "lm_head_bias": True}),
}


@pytest.fixture
def write_case(write_gguf: Callable[..., None]) -> Callable[..., None]:
    """`write_case(path, folder, case, experts=F32)`: `folder` as a GGUF file; stacked experts' numbers as `experts`."""

    def write(path: Path, folder: Path, case: str, experts: GGMLQuantizationType = GGMLQuantizationType.F32) -> None:
        arch, keys, convert, *_ = CASES[case]
        config = json.loads((folder / "config.json").read_text())

        def write_keys(writer: GGUFWriter) -> None:
            common_keys(writer, config)
            keys(writer, config)

        def kind_of(name: str, _: Tensor) -> GGMLQuantizationType:
            return experts if name.endswith("exps.weight") else GGMLQuantizationType.F32

        tensors = convert(load_file(folder / "model.safetensors"), config)
        write_gguf(path, arch, config["num_hidden_layers"], write_keys, tensors, kind_of)

    return write


@pytest.mark.parametrize("case", CASES)
def test_a_file_gives_the_logits_of_its_directory(
    case: str, tmp_path: Path, tiny_model: Callable[..., Path], write_case: Callable[..., None], paged: Any
) -> None:
    *_, model_type, settings = CASES[case]
    folder = tiny_model(model_type, tokenizer=False, **settings)
    write_case(tmp_path / "model.gguf", folder, case)
    prompt = torch.randint(3, 603, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    wanted = paged(folder).logits(prompt)
    assert (paged(tmp_path / "model.gguf").logits(prompt) - wanted).abs().max() / wanted.abs().max() < 1e-5


def test_experts_stored_as_mxfp4_are_widened_as_gguf_widens_them(
    tmp_path: Path, tiny_model: Callable[..., Path], write_case: Callable[..., None]
) -> None:
    kind = GGMLQuantizationType.MXFP4
    folder = tiny_model("gpt_oss", tokenizer=False, **CASES["gpt-oss"][-1])
    write_case(tmp_path / "model.gguf", folder, "gpt-oss", kind)
    published = {t.name: t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}["blk.2.ffn_up_exps.weight"]
    got = load_checkpoint(tmp_path / "model.gguf").read(
        "layers.2.feed_forward.experts.3.up.weight", (96, 64), torch.float32
    )
    assert published.tensor_type is kind
    assert torch.equal(got, torch.from_numpy(gguf.dequantize(published.data, kind)[3]))


def test_a_router_that_is_not_known_is_refused(
    tmp_path: Path, tiny_model: Callable[..., Path], write_case: Callable[..., None]
) -> None:
    case = "DeepSeek-V3, YaRN"
    write_case(tmp_path / "model.gguf", tiny_model("deepseek_v3", tokenizer=False, **CASES[case][-1]), case)
    data = (tmp_path / "model.gguf").read_bytes()
    at = data.index(b"deepseek2.expert_gating_func") + len(b"deepseek2.expert_gating_func") + 4  # its type before it
    assert data[at] == gguf.ExpertGatingFuncType.SIGMOID
    (tmp_path / "model.gguf").write_bytes(data[:at] + b"\x03" + data[at + 1 :])
    with pytest.raises(UserError, match="expert_gating_func 3 is not supported"):
        load_checkpoint(tmp_path / "model.gguf")


def test_an_architecture_that_is_not_known_is_named(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "model.gguf", "dbrx")
    writer.add_tensor("token_embd.weight", np.zeros((3, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="'dbrx' is not supported"):
        load_checkpoint(tmp_path / "model.gguf")
