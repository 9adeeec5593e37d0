"""Loading takes the memory of the weights that are held, and of one tensor in passing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter
from safetensors.torch import load_file, save_file

# A process of its own, so that its highest memory is that of loading. A first, small model brings in the code.
MEASURE = """
import sys
from pathlib import Path
from workers.decoder import model

def memory(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key + ":")) * 1024

model.Decoder.load(Path(sys.argv[1]), dtype=sys.argv[3])
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
decoder = model.Decoder.load(Path(sys.argv[2]), dtype=sys.argv[3])
print(memory("VmRSS") - before, memory("VmHWM") - before)
"""
SLACK = 24 * 1024 * 1024  # code that is used for the first time, bites on their way, what the allocator keeps


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> tuple[Path, int, int]:
    """A bfloat16 checkpoint of 200 MB, how many numbers it holds, and how many its largest tensor."""
    folder = tmp_path_factory.mktemp("big") / "model"
    folder.mkdir()
    shape = {
        **{"vocab_size": 16_000, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 5},
        **{"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True},
    }
    config = json.loads((tiny_model("llama", tokenizer=False) / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | shape))
    tensors = {"model.embed_tokens.weight": torch.ones(16_000, 1024), "model.norm.weight": torch.ones(1024)}
    for i in range(5):
        layer = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}.{norm}.weight"] = torch.ones(1024)
        for name, rows in (("q", 1024), ("k", 512), ("v", 512), ("o", 1024)):
            tensors[f"{layer}.self_attn.{name}_proj.weight"] = torch.ones(rows, 1024)
        for name, rows, columns in (("gate", 4096, 1024), ("up", 4096, 1024), ("down", 1024, 4096)):
            tensors[f"{layer}.mlp.{name}_proj.weight"] = torch.ones(rows, columns)
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder, sum(tensor.numel() for tensor in tensors.values()), 16_000 * 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize(("dtype", "bytes_a_number"), [("float32", 4), ("int8", 1)])
def test_loading_takes_the_weights_and_one_tensor(
    big: tuple[Path, int, int], dtype: str, bytes_a_number: int, tiny_model: Callable[..., Path]
) -> None:
    folder, numbers, largest = big
    small = tiny_model("llama", tokenizer=False)
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(small), str(folder), dtype], capture_output=True, text=True, check=True
    )
    held, highest = map(int, result.stdout.split())
    weights = numbers * bytes_a_number
    passing = largest * 4  # 8-bit weights are quantized from float32
    assert weights * 0.98 < held < weights * 1.02 + SLACK
    assert highest < held + passing + SLACK


@pytest.fixture(scope="module")
def big_gguf(
    big: tuple[Path, int, int], write_gguf: Callable[..., None], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same numbers in a Q8_0 file."""
    folder, _, _ = big
    config = json.loads((folder / "config.json").read_text())
    path = tmp_path_factory.mktemp("big") / "model.gguf"

    def keys(writer: GGUFWriter) -> None:
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_layer_norm_rms_eps(1e-6)

    tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    matrices, vectors = GGMLQuantizationType.Q8_0, GGMLQuantizationType.F32
    write_gguf(
        path,
        MODEL_ARCH.LLAMA,
        config["num_hidden_layers"],
        keys,
        tensors,
        lambda _, x: matrices if x.ndim == 2 else vectors,
    )
    return path


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_loading_gguf_takes_the_weights_and_one_tensor(
    big: tuple[Path, int, int], big_gguf: Path, tiny_model: Callable[..., Path]
) -> None:
    _, numbers, largest = big
    small = tiny_model("llama", tokenizer=False)
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(small), str(big_gguf), "float32"],
        capture_output=True,
        text=True,
        check=True,
    )
    held, highest = map(int, result.stdout.split())
    assert numbers * 4 * 0.98 < held < numbers * 4 * 1.02 + SLACK
    assert highest < held + largest * 4 + SLACK
