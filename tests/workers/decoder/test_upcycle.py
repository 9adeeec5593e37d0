"""A dense checkpoint made into experts computes the same, here and in transformers, and spreads its tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.errors import UserError
from pipeline.tokenizer import load_tokenizer
from workers.decoder.checkpoint import load_checkpoint
from workers.decoder.safetensors_writer import SafetensorsWriter
from workers.decoder.upcycle import fitted_router, upcycle

PROMPT = torch.randint(3, 603, (60,), generator=torch.Generator().manual_seed(3)).tolist()


def largest_difference(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "llama"},
        {"model_type": "llama", "tie_word_embeddings": True, "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 1e3, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32}},
        {"model_type": "mistral", "sliding_window": 21},
    ],
    ids=["llama", "llama 3, tied", "mistral"],
)  # fmt: skip
def test_the_experts_answer_as_the_dense_model_here_and_in_transformers(
    settings: dict[str, Any], tiny_model: Callable[..., Path], tmp_path: Path, paged: Any, reference: Any
) -> None:
    dense = tiny_model(**settings)
    upcycle(dense, tmp_path / "moe", experts=5, top_k=3)
    wanted = paged(dense).logits(PROMPT)
    assert largest_difference(paged(tmp_path / "moe").logits(PROMPT), wanted) < 1e-5
    with torch.inference_mode():
        assert largest_difference(reference(tmp_path / "moe")(torch.tensor([PROMPT])).logits[0], wanted) < 1e-5
    assert load_checkpoint(tmp_path / "moe").config.layers[0].feed_forward.router.num_experts == 5


def test_the_folder_is_complete(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    dense = tiny_model("llama", eos_token_id=[2, 0])
    upcycle(dense, tmp_path / "moe", experts=2, top_k=1)
    text = topics["if"][:300]
    theirs = AutoTokenizer.from_pretrained(tmp_path / "moe")
    assert load_tokenizer(tmp_path / "moe").encode(text) == theirs(text)["input_ids"]
    assert load_tokenizer(tmp_path / "moe").eos_ids == load_tokenizer(dense).eos_ids == {0, 2}
    chat = [{"role": "user", "content": "hello"}]
    original = AutoTokenizer.from_pretrained(dense).apply_chat_template(chat, tokenize=False)
    assert theirs.apply_chat_template(chat, tokenize=False) == original
    for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "moe" / name).read_bytes() == (dense / name).read_bytes()


def test_the_same_seed_gives_the_same_folder_and_another_seed_another_router(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    dense = tiny_model()
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        upcycle(dense, tmp_path / name, experts=3, seed=seed)
    one, again, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "again", "other"))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert {name for name in one if not torch.equal(one[name], other[name])} == {
        f"model.layers.{i}.block_sparse_moe.gate.weight" for i in range(4)
    }


def test_routers_spread_tokens_that_have_much_in_common() -> None:
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(64, generator=generator) * 5
    seen, unseen = (torch.randn(500, 64, generator=generator) + direction for _ in range(2))
    weight = fitted_router(seen, 8, generator)
    counts = (unseen @ weight.T).topk(2, dim=-1).indices.flatten().bincount(minlength=8)
    assert counts.max() < 1.6 * counts.float().mean()
    assert counts.min() > 0.5 * counts.float().mean()
    naive = torch.randn(8, 64, generator=generator)
    assert (unseen @ naive.T).topk(2, dim=-1).indices.flatten().bincount(minlength=8).max() > 450


def test_every_expert_gets_tokens_of_real_text(tiny_model: Callable[..., Path], tmp_path: Path, paged: Any) -> None:
    upcycle(tiny_model(), tmp_path / "moe", experts=4, top_k=2)
    sequences = paged(tmp_path / "moe")
    counts = torch.zeros(4, 4)
    for i, block in enumerate(sequences.decoder.blocks):
        experts, original = block.feed_forward, block.feed_forward.compute

        def count(x: Tensor, rows: Tensor, i: int = i, original: Any = original) -> Tensor:
            counts[i] += rows
            return original(x, rows)

        experts.compute = count
    sequences.logits(load_tokenizer(tmp_path / "moe").encode(topics["for"])[:400])
    share = counts / counts.mean(dim=1, keepdim=True)
    assert share.min() > 0.4
    assert share.max() < 1.8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_are_stored_in_the_smallest_format_that_holds_them(
    dtype: torch.dtype, tiny_model: Callable[..., Path], tmp_path: Path, paged: Any
) -> None:
    dense = Path(shutil.copytree(tiny_model(tokenizer=False), tmp_path / "dense"))
    values = {name: tensor.to(dtype) for name, tensor in load_file(dense / "model.safetensors").items()}
    save_file({name: tensor.float() for name, tensor in values.items()}, dense / "model.safetensors")
    upcycle(dense, tmp_path / "moe", experts=2)
    stored = load_file(tmp_path / "moe" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    got = stored["model.layers.1.block_sparse_moe.experts.1.w3.weight"]
    assert torch.equal(got, values["model.layers.1.mlp.up_proj.weight"])
    assert largest_difference(paged(tmp_path / "moe").logits(PROMPT), paged(dense).logits(PROMPT)) < 1e-5


def test_a_format_can_be_asked_for(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    upcycle(tiny_model(), tmp_path / "moe", experts=2, dtype="bfloat16")
    assert {t.dtype for t in load_file(tmp_path / "moe" / "model.safetensors").values()} == {torch.bfloat16}


def test_large_checkpoints_are_sharded(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((100,), float(i)) for i in range(7)}
    writer = SafetensorsWriter(tmp_path, shard_bytes=900)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    placed = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(placed.values()) == {f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)}
    assert {file.name for file in tmp_path.iterdir()} == {*placed.values(), "model.safetensors.index.json"}
    for name, tensor in tensors.items():
        assert torch.equal(load_file(tmp_path / placed[name])[name], tensor)


SPLITS: list[dict[str, Any]] = [
    {"model_type": "llama"},
    {"model_type": "llama", "tie_word_embeddings": True, "num_key_value_heads": 6},
    {"model_type": "mistral", "sliding_window": 21},
]


@pytest.mark.parametrize("experts", [2, 6])  # of 72 neurons; a sixth is no number of float32
@pytest.mark.parametrize("settings", SPLITS, ids=["llama", "llama, tied", "mistral"])
def test_all_pieces_of_a_split_network_are_the_dense_one_here_and_in_transformers(
    settings: dict[str, Any], experts: int, tiny_model: Callable[..., Path], tmp_path: Path, paged: Any, reference: Any
) -> None:
    dense = tiny_model(**settings, tokenizer=False)
    upcycle(dense, tmp_path / "moe", experts=experts, split=True)
    one, all_of_them = paged(dense), paged(tmp_path / "moe")
    config = all_of_them.decoder.config.layers[0].feed_forward
    assert (config.router.num_experts, config.router.top_k, config.expert.width) == (experts, experts, 72 // experts)
    wanted = one.logits(PROMPT)
    assert largest_difference(all_of_them.logits(PROMPT), wanted) < 1e-5
    with torch.inference_mode():
        assert largest_difference(reference(tmp_path / "moe")(torch.tensor([PROMPT])).logits[0], wanted) < 1e-5
    prompts = [PROMPT[:1], PROMPT[:23]]
    assert all_of_them.greedy(prompts, 32) == one.greedy(prompts, 32)


def test_a_split_networks_experts_are_its_neurons_in_order(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    dense = tiny_model(tokenizer=False)
    upcycle(dense, tmp_path / "moe", experts=3, split=True)
    whole, pieces = load_file(dense / "model.safetensors"), load_file(tmp_path / "moe" / "model.safetensors")
    moe = "model.layers.2.block_sparse_moe"

    def together(letter: str, dim: int) -> Tensor:
        return torch.cat([pieces[f"{moe}.experts.{e}.{letter}.weight"] for e in range(3)], dim)

    assert torch.equal(together("w1", 0), whole["model.layers.2.mlp.gate_proj.weight"])
    assert torch.equal(together("w3", 0), whole["model.layers.2.mlp.up_proj.weight"])
    assert torch.equal(together("w2", 1), whole["model.layers.2.mlp.down_proj.weight"] * 3)
    assert not pieces[f"{moe}.gate.weight"].any()


def test_a_part_of_a_split_networks_experts_gives_other_answers_and_all_get_tokens(
    tiny_model: Callable[..., Path], tmp_path: Path, paged: Any
) -> None:
    dense = tiny_model()
    upcycle(dense, tmp_path / "moe", experts=4, top_k=2, split=True)
    sequences = paged(tmp_path / "moe")
    counts = torch.zeros(4)
    experts = sequences.decoder.blocks[1].feed_forward
    original = experts.compute

    def count(x: Tensor, rows: Tensor) -> Tensor:
        nonlocal counts
        counts += rows
        return original(x, rows)

    experts.compute = count
    ids = load_tokenizer(tmp_path / "moe").encode(topics["for"])[:400]
    got, wanted = sequences.logits(ids), paged(dense).logits(ids)
    assert got.isfinite().all()
    assert largest_difference(got, wanted) > 0.1
    assert counts.min() > 0.4 * counts.mean()


@pytest.mark.parametrize(("experts", "stored"), [(4, torch.bfloat16), (3, torch.float32)])
def test_a_split_network_is_stored_in_a_format_that_holds_the_multiplied_weights(
    experts: int, stored: torch.dtype, tiny_model: Callable[..., Path], tmp_path: Path, paged: Any
) -> None:
    dense = Path(shutil.copytree(tiny_model(tokenizer=False), tmp_path / "dense"))
    values = {name: tensor.bfloat16() for name, tensor in load_file(dense / "model.safetensors").items()}
    save_file(values, dense / "model.safetensors")
    upcycle(dense, tmp_path / "moe", experts=experts, split=True)
    assert {tensor.dtype for tensor in load_file(tmp_path / "moe" / "model.safetensors").values()} == {stored}
    assert largest_difference(paged(tmp_path / "moe").logits(PROMPT), paged(dense).logits(PROMPT)) < 1e-5


@pytest.mark.parametrize(
    ("settings", "arguments", "complaint"),
    [
        ({"model_type": "mixtral"}, {}, "has experts already"),
        ({"attention_bias": True}, {}, "parts that Mixtral's format can't say"),
        ({"hidden_act": "gelu"}, {}, "parts that Mixtral's format can't say"),
        ({}, {"experts": 2, "top_k": 3}, "3 experts a token out of 2"),
        ({}, {"dtype": "int3"}, "dtype 'int3' is not known"),
        ({}, {"experts": 5, "split": True}, "72 neurons can't be split evenly into 5 experts; ask for 4 or 6"),
        ({}, {"experts": 80, "split": True}, "72 neurons can't be split evenly into 80 experts; ask for 36 or 72"),
    ],
)
def test_what_cant_be_upcycled_gets_one_line_and_leaves_nothing(
    settings: dict[str, Any], arguments: dict[str, Any], complaint: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        upcycle(tiny_model(**settings), tmp_path / "moe", **arguments)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_and_a_failure_leaves_nothing(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists already"):
        upcycle(tiny_model(), tmp_path / "there")
    broken = Path(shutil.copytree(tiny_model(), tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.3.mlp.down_proj.weight"]
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(UserError, match=r"down_proj.weight is missing"):
        upcycle(broken, tmp_path / "moe")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be written"):
        upcycle(tiny_model(), tmp_path / "file" / "moe")
    assert {entry.name for entry in tmp_path.iterdir()} == {"there", "broken", "file"}
