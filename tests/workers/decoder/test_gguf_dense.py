"""GGUF files of dense architectures give the logits of the directories whose weights and settings they were made of.

Tensors' names are those of the gguf package's own map; what it doesn't say (row orders, norms' 1, keys) is done as
llama.cpp's converter does it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH, GGUFWriter
from safetensors.torch import load_file
from torch import Tensor

Tensors = dict[str, Tensor]
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 5, "long_factor": [1.0, 1.5, 2.5, 4, 9]}


def llama_keys(writer: GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    if "rope_theta" in config["rope_parameters"]:
        writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])


def gemma2_keys(writer: GGUFWriter, config: dict[str, Any]) -> None:
    llama_keys(writer, config)
    writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    writer.add_sliding_window(config["sliding_window"])


def gemma3_keys(writer: GGUFWriter, config: dict[str, Any]) -> None:
    llama_keys(writer, config)
    full = config["rope_parameters"]["full_attention"]
    writer.add_rope_freq_base(full["rope_theta"])
    writer.add_sliding_window(config["sliding_window"])
    if full["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(full["factor"])


def phi3_keys(writer: GGUFWriter, config: dict[str, Any]) -> None:
    rope = config["rope_parameters"]
    llama_keys(writer, config)
    writer.add_rope_dimension_count(int(rope["partial_rotary_factor"] * config["head_dim"]))
    writer.add_rope_scaling_orig_ctx_len(config["original_max_position_embeddings"])
    writer.add_sliding_window(config["sliding_window"] or 0)
    if rope["rope_type"] == "longrope":
        original, context = config["original_max_position_embeddings"], config["max_position_embeddings"]
        writer.add_rope_scaling_attn_factors(float(np.sqrt(1 + np.log(context / original) / np.log(original))))
        writer.add_tensor("rope_factors_long.weight", np.array(rope["long_factor"], dtype=np.float32))
        writer.add_tensor("rope_factors_short.weight", np.array(rope["short_factor"], dtype=np.float32))


def granite_keys(writer: GGUFWriter, config: dict[str, Any]) -> None:
    llama_keys(writer, config)
    writer.add_embedding_scale(config["embedding_multiplier"])
    writer.add_residual_scale(config["residual_multiplier"])
    writer.add_attention_scale(config["attention_multiplier"])
    writer.add_logit_scale(config["logits_scaling"])


def gpt2_keys(writer: GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])


def gpt_neox_keys(writer: GGUFWriter, config: dict[str, Any]) -> None:
    head_width = config["hidden_size"] // config["num_attention_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_rope_dimension_count(int(config["rope_parameters"]["partial_rotary_factor"] * head_width))
    writer.add_head_count(config["num_attention_heads"])
    writer.add_parallel_residual(config["use_parallel_residual"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])


def phi2_keys(writer: GGUFWriter, config: dict[str, Any]) -> None:
    head_width = config["hidden_size"] // config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(4 * config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_rope_dimension_count(int(config["rope_parameters"]["partial_rotary_factor"] * head_width))


def bloom_keys(writer: GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_context_length(2048)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(4 * config["hidden_size"])
    writer.add_block_count(config["n_layer"])
    writer.add_head_count(config["n_head"])
    writer.add_head_count_kv(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])


def mpt_keys(writer: GGUFWriter, config: dict[str, Any]) -> None:
    attention = config["attn_config"]
    writer.add_context_length(config["max_seq_len"])
    writer.add_embedding_length(config["d_model"])
    writer.add_block_count(config["n_layers"])
    writer.add_feed_forward_length(4 * config["d_model"])
    writer.add_head_count(config["n_heads"])
    writer.add_layer_norm_eps(1e-5)
    if attention["clip_qkv"] is not None:
        writer.add_clamp_kqv(attention["clip_qkv"])
    writer.add_max_alibi_bias(attention["alibi_bias_max"])


def as_they_are(tensors: Tensors, heads: int) -> Tensors:
    return tensors


def gemma_tensors(tensors: Tensors, heads: int) -> Tensors:
    return {name: tensor + 1 if name.endswith("norm.weight") else tensor for name, tensor in tensors.items()}


def gpt2_tensors(tensors: Tensors, heads: int) -> Tensors:
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return {name: tensor.T if name.endswith(turned) else tensor for name, tensor in tensors.items()}


def heads_apart(tensors: Tensors, heads: int) -> Tensors:
    """Fused tensors with query, key and value of each head together -> all queries, all keys, all values."""
    return {
        name.removeprefix("transformer."): tensor.view(heads, 3, -1, *tensor.shape[1:])
        .transpose(0, 1)
        .reshape(tensor.shape)
        if "query_key_value" in name
        else tensor
        for name, tensor in tensors.items()
    }


def granite_tensors(tensors: Tensors, heads: int) -> Tensors:
    """Row i of a head's query or key beside row i + half, as all of Llama's line are converted."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        if "q_proj" in name or "k_proj" in name:
            own = heads if "q_proj" in name else heads // 2  # grouped by two, as tiny models are
            found[name] = tensor.view(own, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    return found


CASES: dict[str, tuple[MODEL_ARCH, Any, Any, str, dict[str, Any]]] = {
    "Qwen 2": (MODEL_ARCH.QWEN2, llama_keys, as_they_are, "qwen2", {"head_dim": 10}),
    "Qwen 3": (MODEL_ARCH.QWEN3, llama_keys, as_they_are, "qwen3", {"head_dim": 14, "tie_word_embeddings": True}),
    "Gemma": (MODEL_ARCH.GEMMA, llama_keys, gemma_tensors, "gemma", {}),
    "Gemma 2": (
        *(MODEL_ARCH.GEMMA2, gemma2_keys, gemma_tensors, "gemma2"),
        {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 10},
    ),
    "Gemma 3": (
        *(MODEL_ARCH.GEMMA3, gemma3_keys, gemma_tensors, "gemma3_text"),
        {
            "query_pre_attn_scalar": 10,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e3},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "Phi-2": (
        *(MODEL_ARCH.PHI2, phi2_keys, as_they_are, "phi"),
        {"num_key_value_heads": 6, "intermediate_size": 240},
    ),
    "Phi-3, partial rotary, window": (
        *(MODEL_ARCH.PHI3, phi3_keys, as_they_are, "phi3"),
        {"partial_rotary_factor": 0.4, "sliding_window": 21},
    ),
    "Phi-3, LongRoPE": (
        *(MODEL_ARCH.PHI3, phi3_keys, as_they_are, "phi3"),
        {"original_max_position_embeddings": 32, "rope_parameters": LONGROPE},
    ),
    "Granite": (MODEL_ARCH.GRANITE, granite_keys, granite_tensors, "granite", {"tie_word_embeddings": True}),
    "GPT-2": (MODEL_ARCH.GPT2, gpt2_keys, gpt2_tensors, "gpt2", {"tie_word_embeddings": True}),
    "GPT-NeoX": (MODEL_ARCH.GPTNEOX, gpt_neox_keys, heads_apart, "gpt_neox", {}),
    "GPT-NeoX, one after the other": (
        *(MODEL_ARCH.GPTNEOX, gpt_neox_keys, heads_apart, "gpt_neox"),
        {"use_parallel_residual": False},
    ),
    "BLOOM": (MODEL_ARCH.BLOOM, bloom_keys, heads_apart, "bloom", {"tie_word_embeddings": True}),
    "MPT": (MODEL_ARCH.MPT, mpt_keys, as_they_are, "mpt", {"attn_config": {"clip_qkv": 1.5, "alibi_bias_max": 4}}),
}


@pytest.fixture
def write_case(write_gguf: Callable[..., None]) -> Callable[[Path, Path, str], None]:
    """`write_case(path, folder, case)`: what is in `folder` as a GGUF file."""

    def write(path: Path, folder: Path, case: str) -> None:
        arch, keys, convert, *_ = CASES[case]
        config = json.loads((folder / "config.json").read_text())
        layers = next(config[key] for key in ("num_hidden_layers", "n_layer", "n_layers") if key in config)
        heads = next(config[key] for key in ("num_attention_heads", "n_head", "n_heads") if key in config)
        tensors = convert(load_file(folder / "model.safetensors"), heads)
        write_gguf(path, arch, layers, lambda writer: keys(writer, config), tensors)

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
