"""8-bit weights: what rounding may cost, both variants of the handles, and whole decoders held in them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from jobs.spec import ClusterSpec
from workers.decoder import ops
from workers.decoder.int8 import Int8Bank, Int8Weight, quantized
from workers.decoder.kernels import native
from workers.decoder.kernels.packed import PackedBank, PackedWeight
from workers.decoder.model import Decoder
from workers.decoder.precision import DTYPES
from workers.engine import Engine, SamplingParams
from workers.forecast import forecast
from workers.settings import EngineSettings

CPU = torch.device("cpu")
PROMPT = torch.randint(3, 603, (40,), generator=torch.Generator().manual_seed(3)).tolist()
kernels = pytest.mark.skipif(not native.available(), reason="the kernels in C could not be built")


def test_each_row_is_rounded_to_127_steps_of_its_own() -> None:
    matrix = torch.randn(700, 50) * torch.logspace(-6, 6, 700)[:, None]
    matrix[3] = 0.0
    integers, scales = quantized(matrix)
    assert integers.dtype == torch.int8
    assert integers.abs().amax(dim=1).tolist() == [0 if row == 3 else 127 for row in range(700)]
    torch.testing.assert_close(scales, matrix.abs().amax(dim=1) / 127)
    error = (integers.double() * scales[:, None].double() - matrix.double()).abs()
    assert (error <= scales[:, None].double() * 0.5001).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_number_in_a_checkpoint_stays_visible(bad: float) -> None:
    matrix = torch.ones(3, 4)
    matrix[1, 2] = bad
    weight = ops.new_weight(3, 4, dtype=torch.int8, device=CPU)
    weight.put(0, matrix)
    assert ops.linear(torch.ones(1, 4), weight)[0].isfinite().tolist() == [True, False, True]


@kernels
def test_a_packed_8_bit_weight_answers_as_the_reference() -> None:
    torch.manual_seed(0)
    matrix, x, bias = torch.randn(37, 20), torch.randn(29, 20), torch.randn(37)
    packed, plain = PackedWeight(37, 20, dtype=torch.int8), Int8Weight(37, 20)
    for weight in (packed, plain):  # in parts whose borders cut through panels, one of them within one
        for first, end in ((0, 20), (20, 22), (22, 37)):
            weight.put(first, matrix[first:end])
    ids = torch.tensor([0, 36, 5, 5, 16])
    assert packed.shape == plain.shape
    assert torch.equal(packed.rows(ids), plain.rows(ids))
    torch.testing.assert_close(ops.linear(x, packed, bias), ops.linear(x, plain, bias))
    torch.testing.assert_close(ops.linear(x[:1], packed), ops.linear(x[:1], plain))
    away = (ops.linear(x, plain) - x @ matrix.T).norm() / (x @ matrix.T).norm()
    assert 1e-3 < away < 1e-2  # rounded, and to 8 bits


@kernels
def test_a_packed_8_bit_bank_answers_as_the_reference() -> None:
    torch.manual_seed(0)
    banks = [PackedBank([4, 1, 7], 37, 20, dtype=torch.int8), Int8Bank([4, 1, 7], 37, 20)]
    for slot in range(3):
        matrix = torch.randn(37, 20)
        for bank in banks:
            bank.put(slot, 0, matrix[:5])
            bank.put(slot, 5, matrix[5:])
    x, bias, runs = torch.randn(8, 20), torch.randn(3, 37), torch.tensor([5, 0, 3])
    torch.testing.assert_close(ops.grouped_linear(x, banks[0], runs, bias), ops.grouped_linear(x, banks[1], runs, bias))
    torch.testing.assert_close(ops.grouped_linear(x, banks[0], runs), ops.grouped_linear(x, banks[1], runs))


@pytest.mark.parametrize("packed", [pytest.param(True, marks=kernels), False])
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_a_decoder_in_8_bits_is_the_one_of_the_rounded_weights_in_a_quarter_of_the_memory(
    model_type: str,
    packed: bool,
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    paged: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tiny_model(model_type, tokenizer=False)
    rounded = Path(shutil.copytree(path, tmp_path / "rounded"))
    tensors = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and "gate.weight" not in name:  # neither norms nor routers
            integers, scales = quantized(tensor)
            tensors[name] = integers.float() * scales[:, None]
    save_file(tensors, rounded / "model.safetensors")
    if not packed:
        monkeypatch.setattr("workers.decoder.ops._packs", lambda dtype, device: False)
    decoder, wanted = Decoder.load(path, dtype="int8"), Decoder.load(rounded, dtype="float32")
    handles = PackedWeight if packed else Int8Weight
    assert all(
        isinstance(w, handles) for w in (decoder.embedding.tokens, decoder.head.weight, decoder.blocks[0].attention.qkv)
    )
    assert decoder.head.weight.nbytes < wanted.head.weight.nbytes / 3.5  # 60 columns and a scale of 4 bytes
    if model_type == "mixtral":
        assert decoder.blocks[0].feed_forward.gate_up.dtype == torch.int8
        assert decoder.blocks[0].feed_forward.router.dtype == torch.float32
    got, wide = paged(decoder).logits(PROMPT), paged(wanted).logits(PROMPT)
    assert got.dtype == torch.float32
    assert (got - wide).abs().max() / wide.abs().max() < 1e-5
    assert (got - paged(path).logits(PROMPT)).abs().max() / wide.abs().max() > 1e-3  # not float32 in disguise


@pytest.mark.parametrize("file", sorted((Path(__file__).parent / "parity").glob("*.yaml")), ids=lambda file: file.stem)
def test_each_architecture_is_near_float32_in_8_bits(file: Path, tiny_model: Callable[..., Path], paged: Any) -> None:
    case = next(iter(yaml.safe_load(file.read_text(encoding="utf-8"))["cases"].values()))
    path = tiny_model(file.stem, tokenizer=False, **{k: v for k, v in case.items() if k != "prompt_lengths"})
    # One token: in a longer text random weights carry a token that was sent to another expert far away.
    got, wanted = (paged(Decoder.load(path, dtype=dtype)).logits(PROMPT[:1]) for dtype in ("int8", "float32"))
    assert 1e-3 < (got - wanted).norm() / wanted.norm() < 0.08


@kernels
def test_a_rows_answer_does_not_depend_on_its_neighbours(tiny_model: Callable[..., Path], paged: Any) -> None:
    decoder = Decoder.load(tiny_model("mixtral", tokenizer=False), dtype="int8")
    prompts = {i: PROMPT[: 3 + 5 * i] for i in range(5)}
    together, alone = paged(decoder).step(prompts), paged(decoder, seed=1)
    for i, prompt in prompts.items():
        assert torch.equal(together[i], alone.step({i: prompt})[i])


def test_tied_rows_are_read_as_they_are_multiplied(tiny_model: Callable[..., Path]) -> None:
    decoder = Decoder.load(tiny_model(tie_word_embeddings=True, tokenizer=False), dtype="int8")
    ids = torch.tensor([5, 600])
    columns = decoder.logits(torch.eye(60))  # [60, V]: the table's columns
    torch.testing.assert_close(decoder.embedding.tokens.rows(ids), columns[:, ids].T)


def test_the_engine_takes_it_by_its_name(tiny_model: Callable[..., Path]) -> None:
    engine = Engine.from_checkpoint(tiny_model(), device="cpu", dtype="int8", kv_cache_bytes=1 << 22)
    (output,) = engine.generate(["for x in"], SamplingParams(max_new_tokens=4, temperature=0.0, ignore_eos=True))
    assert len(output.token_ids) == 4


def test_a_job_knows_the_formats_that_the_decoder_knows() -> None:
    assert ClusterSpec.model_fields["dtype"].annotation.__args__ == DTYPES


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_the_memory_that_is_forecast_is_the_memory_that_is_held(
    model_type: str, dtype: str, tiny_model: Callable[..., Path]
) -> None:
    path = tiny_model(model_type, tokenizer=False, hidden_size=192, intermediate_size=320, head_dim=32)
    decoder = Decoder.load(path, dtype=dtype)
    weights = [decoder.embedding.tokens, decoder.head.weight]
    for block in decoder.blocks:
        forward = block.feed_forward
        weights += [block.attention.qkv, block.attention.output]
        weights += (
            [forward.router, forward.gate_up, forward.down] if model_type == "mixtral" else [forward.up, forward.down]
        )
    held = sum(weight.nbytes for weight in weights)
    told = forecast(EngineSettings(model_path=str(path), device="cpu", dtype=dtype, threads=1))
    assert told.dtype == dtype
    assert told.weight_bytes == pytest.approx(held, rel=0.02)  # panels' last columns, routers, and scales of wide rows
