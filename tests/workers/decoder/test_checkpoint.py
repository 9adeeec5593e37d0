"""Reading safetensors checkpoints: sharded and not, by slice, and what is said of those that are not whole."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import UserError
from workers.decoder.checkpoint import load_checkpoint
from workers.decoder.config import RopeScaling
from workers.decoder.model import Decoder
from workers.decoder.safetensors_files import SafetensorsFiles
from workers.decoder.storage import Source

PROMPT = [5, 300, 17, 42, 602, 3, 3, 99]


@pytest.fixture
def copy(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint of one's own, to damage."""

    def make(*arguments: Any, **settings: Any) -> Path:
        return Path(shutil.copytree(tiny_model(*arguments, tokenizer=False, **settings), tmp_path / "model"))

    return make


def rewrite_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


def shard(folder: Path) -> None:
    """Spread the tensors over three files, round and round."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    placed = {name: f"model-{i % 3 + 1:05d}-of-00003.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(placed.values()):
        save_file({name: t for name, t in tensors.items() if placed[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def test_shards_are_read_as_one_checkpoint(copy: Callable[..., Path], tiny_model: Any, paged: Any) -> None:
    folder = copy("mixtral")
    shard(folder)
    whole = tiny_model("mixtral", tokenizer=False)
    assert torch.equal(paged(folder).logits(PROMPT), paged(whole).logits(PROMPT))


def test_experts_in_one_stacked_tensor_are_read_as_the_published_ones(
    copy: Callable[..., Path], tiny_model: Any, paged: Any
) -> None:
    folder = copy("mixtral")
    tensors = load_file(folder / "model.safetensors")
    assert "model.layers.0.block_sparse_moe.experts.4.w3.weight" in tensors  # so that the other tests read these names
    for i in range(4):
        old, new = f"model.layers.{i}.block_sparse_moe", f"model.layers.{i}.mlp"
        single = {n: [tensors.pop(f"{old}.experts.{e}.{n}.weight") for e in range(5)] for n in ("w1", "w2", "w3")}
        both = [torch.cat([gate, up]) for gate, up in zip(single["w1"], single["w3"], strict=True)]
        tensors[f"{new}.experts.gate_up_proj"] = torch.stack(both)
        tensors[f"{new}.experts.down_proj"] = torch.stack(single["w2"])
        tensors[f"{new}.gate.weight"] = tensors.pop(f"{old}.gate.weight")
    save_file(tensors, folder / "model.safetensors")
    published = tiny_model("mixtral", tokenizer=False)
    assert torch.equal(paged(folder).logits(PROMPT), paged(published).logits(PROMPT))


@pytest.mark.parametrize(
    "old",
    [
        {"rope_theta": 5e3, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_theta": 5e3, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ],
)
def test_configurations_of_older_transformers_mean_the_same(
    copy: Callable[..., Path], paged: Any, old: dict[str, Any]
) -> None:
    folder = copy("llama", rope_parameters={"rope_type": "linear", "rope_theta": 5e3, "factor": 4.0})
    new = paged(folder).logits(PROMPT)
    rewrite_config(folder, rope_parameters="absent", head_dim="absent", dtype="absent", torch_dtype="float32", **old)
    rewrite_config(folder, rope_scaling={"type": "linear", "factor": 4.0})
    assert load_checkpoint(folder).config.layers[0].attention.rotary.scaling == RopeScaling(kind="linear", factor=4.0)
    assert torch.equal(paged(folder).logits(PROMPT), new)


def test_what_a_configuration_leaves_out_is_the_architectures_default(copy: Callable[..., Path]) -> None:
    folder = copy("mixtral", rope_parameters={"rope_type": "default", "rope_theta": 123.0})
    assert load_checkpoint(folder).config.layers[0].attention.rotary.theta == 123.0
    rewrite_config(folder, rope_parameters="absent", rms_norm_eps="absent")
    layer = load_checkpoint(folder).config.layers[0]
    assert (layer.attention.rotary.theta, layer.norm.eps, layer.attention.spec.window) == (1e6, 1e-5, None)
    rewrite_config(folder, model_type="mistral")
    layer = load_checkpoint(folder).config.layers[0]
    assert (layer.attention.rotary.theta, layer.norm.eps, layer.attention.spec.window) == (1e4, 1e-6, None)
    rewrite_config(folder, sliding_window="absent")
    assert load_checkpoint(folder).config.layers[0].attention.spec.window == 4096


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_in_other_formats_are_widened_exactly(copy: Callable[..., Path], dtype: torch.dtype) -> None:
    folder = copy()
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    got = load_checkpoint(folder).read("layers.2.feed_forward.up.weight", (72, 60), torch.float32)
    assert torch.equal(got, tensors["model.layers.2.mlp.up_proj.weight"].float())


def test_a_slice_is_read_without_the_rest(tmp_path: Path) -> None:
    stacked = torch.randn(3, 8, 5)
    save_file({"a": torch.randn(7), "stacked": stacked}, tmp_path / "model.safetensors")
    files = SafetensorsFiles(tmp_path)
    assert torch.equal(files.read(Source("stacked", at=1, rows=(2, 6)), torch.float32), stacked[1, 2:6])
    assert torch.equal(files.read(Source("stacked", rows=(1, 3)), torch.float32), stacked[1:3])
    got = files.read(Source("stacked", at=2, arrange=lambda t: t.T), torch.bfloat16)
    assert torch.equal(got, stacked[2].T.bfloat16())


def test_a_rank_reads_only_the_experts_it_holds(copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy("mixtral")
    whole = Decoder.load(folder)
    read: list[str] = []
    original = SafetensorsFiles.read
    monkeypatch.setattr(
        SafetensorsFiles, "read", lambda self, source, dtype: read.append(source.name) or original(self, source, dtype)
    )
    part = Decoder.load(folder, experts=[[3, 1], [0, 2], [4, 4], []])
    experts = {name.split("block_sparse_moe.")[1] for name in read if "layers.0.block_sparse_moe.experts" in name}
    assert experts == {f"experts.{e}.{w}.weight" for e in (1, 3) for w in ("w1", "w2", "w3")}
    assert part.blocks[0].feed_forward.gate_up.experts == (3, 1)
    x, rows = torch.randn(4, 60), torch.tensor([1, 3])
    got = part.blocks[0].feed_forward.compute(x, rows)
    runs = torch.tensor([0, 3, 0, 1, 0])
    wanted = whole.blocks[0].feed_forward.compute(torch.cat([x[1:], x[:1]]), runs)
    torch.testing.assert_close(got, torch.cat([wanted[3:], wanted[:3]]))


def damage_header(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def rewrite_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


Q = "model.layers.1.self_attn.q_proj.weight"
WEIGHTS = "model.safetensors"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a missing tensor": (lambda f: rewrite_tensors(f, lambda t: t.pop(Q)), f"{Q} is missing"),
    "a misshapen tensor": (
        lambda f: rewrite_tensors(f, lambda t: t.update({Q: torch.zeros(60, 61)})),
        r"has the shape \[60, 61\], but the configuration needs it to be \[60, 60\]",
    ),
    "a misshapen vector": (
        lambda f: rewrite_tensors(f, lambda t: t.update({"model.norm.weight": torch.zeros(61)})),
        r"model.norm.weight has the shape \[61\]",
    ),
    "another vocabulary": (lambda f: rewrite_config(f, vocab_size=604), r"embed_tokens.weight has the shape"),
    "a vocabulary past all memory": (lambda f: rewrite_config(f, vocab_size=10**15), "embed_tokens.weight has the"),
    "more layers": (lambda f: rewrite_config(f, num_hidden_layers=5), "layers.4.input_layernorm.weight is missing"),
    "a truncated file": (lambda f: os.truncate(f / WEIGHTS, 50_000), "truncated: it holds 50000 bytes"),
    "a truncated header": (lambda f: os.truncate(f / WEIGHTS, 100), "truncated"),
    "an empty file": (lambda f: os.truncate(f / WEIGHTS, 0), "can't be read"),
    "another kind of file": (lambda f: (f / WEIGHTS).write_bytes(b"PK\3\4" * 100), "not safetensors"),
    "a header that is no JSON": (
        lambda f: (f / WEIGHTS).write_bytes(struct.pack("<Q", 9) + b"{{{{{{{{{" + bytes(99)), "is not JSON"
    ),
    "a header with a wrong range": (
        lambda f: damage_header(f, lambda h: h[Q].update(data_offsets=[0, 10])), "describes tensor .* wrongly"
    ),
    "a header with a negative range": (
        lambda f: damage_header(f, lambda h: h[Q].update(data_offsets=[-14400, 0])), "describes tensor .* wrongly"
    ),
    "a header longer than the file": (
        lambda f: (f / WEIGHTS).write_bytes(struct.pack("<Q", 2**63) + b"{}"), "its header would be 9223372036854775808"
    ),
    "a header that is a list": (
        lambda f: (f / WEIGHTS).write_bytes(struct.pack("<Q", 9) + b"[1, 2, 3]" + bytes(99)), "is not JSON that says"
    ),
    "a header nested past all sense": (
        lambda f: (f / WEIGHTS).write_bytes(struct.pack("<Q", 10**5) + b"[" * 10**5), "is not JSON that says"
    ),
    "a header with a range past the file": (
        lambda f: damage_header(f, lambda h: h[Q].update(data_offsets=[10**9, 10**9 + 14400])), "truncated: it holds"
    ),
    "a header with two tensors in one place": (
        lambda f: damage_header(f, lambda h: h[Q].update(data_offsets=[n + 4 for n in h[Q]["data_offsets"]])),
        f"puts tensors .*{Q}.* into the same bytes",
    ),
    "a header with half a byte range": (
        lambda f: damage_header(f, lambda h: h[Q].update(data_offsets=[0])), "describes tensor .* wrongly"
    ),
    "a header with another shape for the same bytes": (
        lambda f: damage_header(f, lambda h: h[Q].update(shape=[30, 120])), r"has the shape \[30, 120\]"
    ),
    "a number format nobody knows": (
        lambda f: damage_header(f, lambda h: h[Q].update(dtype="Q7")), f"{Q} is stored as Q7, which can't be read"
    ),
    "layers past all memory": (lambda f: rewrite_config(f, num_hidden_layers=10**15), "config.json: has numbers"),
    "integers for weights": (
        lambda f: rewrite_tensors(f, lambda t: t.update({Q: torch.zeros(60, 60, dtype=torch.int32)})),
        "stored as I32, which can't be read",
    ),
    "only a pickle": (
        lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"), "pickled weights are never read.*convert"
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "neither model.safetensors nor"),
    "no configuration": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "a configuration that is no JSON": (lambda f: (f / "config.json").write_text("{"), "can't be read as JSON"),
    "an unknown architecture": (
        lambda f: rewrite_config(f, model_type="mamba"), "architecture 'mamba' is not supported .*llama"
    ),
    "no architecture": (lambda f: rewrite_config(f, model_type="absent"), "model_type is missing"),
    "heads that can't be shared": (lambda f: rewrite_config(f, num_key_value_heads=4), "6 query heads can't be shared"),
    "a width that is no number": (lambda f: rewrite_config(f, hidden_size="60"), "hidden_size must be a whole number"),
    "no layers": (lambda f: rewrite_config(f, num_hidden_layers=0), "num_hidden_layers must be a whole number above 0"),
    "an unknown activation": (lambda f: rewrite_config(f, hidden_act="tanh"), "hidden_act 'tanh' is not supported"),
    "an unknown rope": (
        lambda f: rewrite_config(f, rope_parameters={"rope_type": "spiral"}), "rope_type 'spiral' is not supported"
    ),
    "quantized weights": (
        lambda f: rewrite_config(f, quantization_config={"quant_method": "gptq"}), "weights quantized by 'gptq'"
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_not_whole_gets_one_line_that_names_the_file(copy: Callable[..., Path], damage: str) -> None:
    folder = copy()
    spoil, complaint = DAMAGE[damage]
    spoil(folder)
    with pytest.raises(UserError, match=complaint) as caught:
        Decoder.load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_format_nobody_knows_is_no_matter_in_a_tensor_nobody_needs(copy: Callable[..., Path], paged: Any) -> None:
    folder = copy()
    wanted = paged(folder).logits(PROMPT)
    rewrite_tensors(folder, lambda t: t.update(other=torch.zeros(4)))
    damage_header(folder, lambda h: h["other"].update(dtype="Q7"))
    assert torch.equal(paged(folder).logits(PROMPT), wanted)


@pytest.mark.parametrize("seed", range(8))
def test_a_file_with_any_bytes_changed_is_read_or_refused_in_one_line(copy: Callable[..., Path], seed: int) -> None:
    folder = copy()
    whole = (folder / WEIGHTS).read_bytes()
    header, choose = 8 + int.from_bytes(whole[:8], "little"), random.Random(seed)
    for _ in range(25):
        data = bytearray(whole)
        at = choose.randrange(header)
        data[at : at + choose.choice([1, 1, 8])] = choose.randbytes(choose.choice([0, 1, 1, 1, 8]))
        (folder / WEIGHTS).write_bytes(data)
        said = f"{folder}: nothing"
        try:
            Decoder.load(folder)
        except UserError as error:
            said = str(error)
        assert str(folder) in said
        assert "\n" not in said


SHARD = "model-00002-of-00003.safetensors"


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda f: (f / SHARD).unlink(), f"{SHARD}: no such file, but .*index.json lists it"),
        (lambda f: os.truncate(f / SHARD, 30_000), f"{SHARD}: truncated"),
        (lambda f: save_file({"x": torch.zeros(1)}, f / SHARD), f"{SHARD}: has no tensor"),
        (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "index.json: not an index of shards"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/passwd"}}'),
            "must name files beside it",
        ),
    ],
)
def test_shards_that_are_not_whole_get_one_line(copy: Callable[..., Path], spoil: Any, complaint: str) -> None:
    folder = copy()
    shard(folder)
    spoil(folder)
    with pytest.raises(UserError, match=complaint) as caught:
        Decoder.load(folder)
    assert "\n" not in str(caught.value)
