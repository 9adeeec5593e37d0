"""A dense Llama or Mistral -> a Mixture-of-Experts in Mixtral's format that computes the same.

In copies: every expert is a copy of the dense feed-forward network (Komatsuzaki et al. 2022), and the weights of a
token's experts sum to one, so whichever are chosen, their answer is the dense one.

Split: expert e of E has the neurons e * F / E to (e + 1) * F / E of the dense network's F (rows of gate and up, columns
of down), so that all of them together are the dense network. Mixtral's weights sum to one, so that E chosen equally
weigh 1 / E each: down is stored E times as large, which makes the sum exact. With all E experts a token the router is
zero and the model computes what the dense one does. With fewer it is fitted as for copies, the experts differ, and the
answer is an estimate of the dense sum: a model to test routing and placement with, and not a good one to talk to.

N tokens of the sample, C model width, F feed-forward width, E experts.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.tokenizer import load_tokenizer
from pipeline.tokenizers.export import write_tokenizer
from workers.decoder import ops
from workers.decoder.attention import AttentionMetadata, AttentionSpec
from workers.decoder.block import Block
from workers.decoder.checkpoint import Checkpoint, load_checkpoint, read_document
from workers.decoder.config import AttentionConfig, DecoderConfig, FeedForwardConfig, LayerConfig, NormConfig
from workers.decoder.feedforward import FeedForward
from workers.decoder.memory import freed_at_once
from workers.decoder.position import Rotary
from workers.decoder.safetensors_writer import SafetensorsWriter
from workers.decoder.tensors import Tensors

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SEQUENCES, _SEQUENCE_TOKENS, _BLOCK_TOKENS = 16, 64, 64  # of the sample that routers are fitted to
_CPU = torch.device("cpu")


def upcycle(
    model: Path,
    out: Path,
    *,
    experts: int = 8,
    top_k: int | None = None,
    split: bool = False,
    seed: int = 0,
    dtype: str = "auto",
) -> None:
    """Write a Mixtral-format directory to `out`, which must not exist yet: it appears whole or not at all.

    `top_k` experts a token: by default all where the network is `split`, else 2 of the copies. Router weights are drawn
    from `seed` and made to spread the tokens of ordinary text over the experts. `dtype` is how weights are stored:
    "auto" takes the smallest format that holds their values exactly. Tokenizer files, chat template and
    generation_config.json come along, so that the directory is complete.
    Peak memory: about a layer of the source and a shard (0.9 GB). UserError when the source can't be upcycled.
    """
    if top_k is None:
        top_k = experts if split else min(2, experts)
    if not 1 <= top_k <= experts:
        raise UserError(f"upcycle: {top_k} experts a token out of {experts} can't be chosen; ask for 1 to {experts}")
    if dtype != "auto" and dtype not in _DTYPES:
        raise UserError(f"upcycle: dtype {dtype!r} is not known; use auto, {', '.join(_DTYPES)}")
    if out.exists():
        raise UserError(f"{out}: exists already; name a folder that does not")
    checkpoint = load_checkpoint(model)
    _check_fits_mixtral(checkpoint)
    plan = _Plan(experts=experts, top_k=top_k, pieces=experts if split else 1)
    plan.check(checkpoint)
    stored = smallest_exact_dtype(checkpoint, down_scale=plan.pieces) if dtype == "auto" else _DTYPES[dtype]
    work = out.with_name(f".{out.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
        with freed_at_once(), torch.inference_mode():
            _write_weights(checkpoint, work, plan, seed, stored, _sample(checkpoint, seed))
        _write_json(work / "config.json", _config(checkpoint, plan, stored))
        _write_generation_config(checkpoint, work)
        write_tokenizer(model, work)
        work.rename(out)
    except OSError as error:
        raise UserError(f"{error.filename or out}: can't be written: {error.strerror}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """`pieces` that the dense network is cut into: as many as experts, or one, of which each expert is a copy."""

    experts: int
    top_k: int
    pieces: int

    def check(self, checkpoint: Checkpoint) -> None:
        """UserError where the neurons can't be shared out evenly."""
        width = _feed_forward(checkpoint).width
        if width % self.pieces:
            divisors = [n for n in range(2, min(width, 2 * self.pieces) + 1) if width % n == 0]
            near = sorted(sorted(divisors, key=lambda n: abs(n - self.pieces))[:2])
            raise UserError(
                f"{checkpoint.path}: its feed-forward layers' {width} neurons can't be split evenly into {self.pieces} "
                f"experts; ask for {' or '.join(map(str, near)) or 1}"
            )

    def piece(self, expert: int, dense: Tensor, dim: int) -> Tensor:
        """The expert's neurons of a dense matrix that has them along `dim`."""
        size = dense.shape[dim] // self.pieces
        return dense.narrow(dim, expert % self.pieces * size, size)


def _feed_forward(checkpoint: Checkpoint) -> FeedForwardConfig:
    found = checkpoint.config.layers[0].feed_forward
    assert isinstance(found, FeedForwardConfig)
    return found


def smallest_exact_dtype(checkpoint: Checkpoint, down_scale: int = 1) -> torch.dtype:
    """bfloat16, else float16, if it holds every one of the weights exactly; else float32. Reads all of them.

    Feed-forward networks' down projections are looked at as they will be stored, times `down_scale`.
    """
    possible = [torch.bfloat16, torch.float16]
    scales = {
        source: down_scale if name.endswith("feed_forward.down.weight") else 1
        for name, source in checkpoint.sources.items()
    }
    for source, scale in scales.items():
        if source.name in checkpoint.storage.names and possible:
            tensor = checkpoint.storage.read(source, torch.float32) * scale
            possible = [dtype for dtype in possible if torch.equal(tensor.to(dtype).float(), tensor)]
    return possible[0] if possible else torch.float32


def fitted_router(inputs: Tensor, experts: int, generator: torch.Generator) -> Tensor:
    """Router weights [E, C] under which tokens like `inputs` [N, C] go to all experts about as often.

    Random directions, less what they have in common with the mean input: hidden states share a large part, which would
    send every token to the same experts. Each expert's logits get a deviation of 1 over the inputs.
    """
    weight = torch.randn(experts, inputs.shape[1], generator=generator)
    mean = inputs.mean(0)
    weight -= (weight @ mean)[:, None] * mean / mean.square().sum().clamp(min=1e-12)
    return weight / (inputs @ weight.T).std(0).clamp(min=1e-6)[:, None]


def _check_fits_mixtral(checkpoint: Checkpoint) -> None:
    config, where = checkpoint.config, checkpoint.path
    layer = config.layers[0]
    spec, rotary, feed_forward = layer.attention.spec, layer.attention.rotary, layer.feed_forward
    if not isinstance(feed_forward, FeedForwardConfig):
        raise UserError(f"{where}: has experts already; upcycle a dense checkpoint")
    plain = LayerConfig(
        attention=AttentionConfig(
            spec=AttentionSpec(
                num_heads=spec.num_heads,
                num_kv_heads=spec.num_kv_heads,
                head_width=spec.head_width,
                value_width=spec.head_width,
                scale=spec.head_width**-0.5,
                window=spec.window,
            ),
            rotary=rotary,
        ),
        feed_forward=FeedForwardConfig(width=feed_forward.width, activation="silu"),
        norm=NormConfig(eps=layer.norm.eps),
    )
    expressible = DecoderConfig(
        architecture=config.architecture,
        vocab_size=config.vocab_size,
        hidden_width=config.hidden_width,
        max_context=config.max_context,
        layers=(plain,) * len(config.layers),
        norm=plain.norm,
        tied_embeddings=config.tied_embeddings,
    )
    if config != expressible or rotary is None:
        raise UserError(
            f"{where}: this {config.architecture} has parts that Mixtral's format can't say (biases, another norm or "
            "activation, layers that differ); upcycle a plain Llama or Mistral"
        )
    if rotary.scaling is not None and rotary.scaling.kind == "divisors":
        raise UserError(
            f"{where}: has its rotary scaling as a tensor, which Mixtral's format can't say; "
            "upcycle the model's Hugging Face directory"
        )
    if rotary.width != spec.head_width or (rotary.scaling and rotary.scaling.kind not in ("linear", "llama3")):
        raise UserError(
            f"{where}: has rotary positions that upcycling can't say in Mixtral's format; "
            "upcycle a plain Llama or Mistral"
        )


def _sample(checkpoint: Checkpoint, seed: int) -> Tensor:
    """Token ids [sequences, tokens] of ordinary text; of no sense where the checkpoint has no tokenizer."""
    model, config = checkpoint.path, checkpoint.config
    length = min(_SEQUENCE_TOKENS, config.max_context)
    if model.is_dir() and not any((model / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, config.vocab_size, (_SEQUENCES, length), generator=generator)
    tokenizer = load_tokenizer(model)
    ids = [i for name in sorted(topics) for i in tokenizer.encode(topics[name][:1000], add_special_tokens=False)]
    spread = torch.tensor(ids)[: len(ids) // _SEQUENCES * _SEQUENCES].view(_SEQUENCES, -1)
    return spread[:, :length].clamp(max=config.vocab_size - 1)


def _write_weights(
    checkpoint: Checkpoint, work: Path, plan: _Plan, seed: int, stored: torch.dtype, sample: Tensor
) -> None:
    """Layer after layer: what the sample's tokens look like to the router, then the layer's tensors."""
    config = checkpoint.config
    tensors = Tensors(checkpoint, "", torch.float32, _CPU)
    writer = SafetensorsWriter(work)

    def copy(ours: str, published: str, *shape: int) -> Tensor:
        tensor = checkpoint.read(ours, shape, stored)
        writer.add(published, tensor)
        return tensor

    generator = torch.Generator().manual_seed(seed)
    embedding = copy("embedding.weight", "model.embed_tokens.weight", config.vocab_size, config.hidden_width)
    x = embedding[sample.flatten()].float()  # [N, C]
    del embedding
    rotary = config.layers[0].attention.rotary
    assert rotary is not None
    rotation = Rotary(rotary, _CPU, context=config.max_context)(torch.arange(sample.shape[1]).repeat(sample.shape[0]))
    for i, layer in enumerate(config.layers):
        x, inputs = _layer_on_sample(Block.load(i, config, tensors), x, rotation, sample)
        ours, published = f"layers.{i}", f"model.layers.{i}"
        spec, width = layer.attention.spec, config.hidden_width
        copy(f"{ours}.attention_norm.weight", f"{published}.input_layernorm.weight", width)
        copy(f"{ours}.feed_forward_norm.weight", f"{published}.post_attention_layernorm.weight", width)
        for name, letter, heads in (("query", "q", spec.num_heads), ("key", "k", spec.num_kv_heads)):
            into = f"{published}.self_attn.{letter}_proj.weight"
            copy(f"{ours}.attention.{name}.weight", into, heads * spec.head_width, width)
        into = f"{published}.self_attn.v_proj.weight"
        copy(f"{ours}.attention.value.weight", into, spec.num_kv_heads * spec.value_width, width)
        into = f"{published}.self_attn.o_proj.weight"
        copy(f"{ours}.attention.output.weight", into, width, spec.num_heads * spec.value_width)
        moe = f"{published}.block_sparse_moe"
        if 1 < plan.pieces == plan.top_k:
            router = torch.zeros(plan.experts, width)
        else:
            router = fitted_router(inputs, plan.experts, generator)
        writer.add(f"{moe}.gate.weight", router.to(stored))
        inner = _feed_forward(checkpoint).width
        for name, letter, shape, neurons in (
            ("gate", "w1", (inner, width), 0),
            ("up", "w3", (inner, width), 0),
            ("down", "w2", (width, inner), 1),
        ):
            dense = checkpoint.read(f"{ours}.feed_forward.{name}.weight", shape, torch.float32)
            if name == "down":
                dense *= plan.pieces
            dense = dense.to(stored)
            for e in range(plan.experts):
                writer.add(f"{moe}.experts.{e}.{letter}.weight", plan.piece(e, dense, neurons).contiguous())
    copy("norm.weight", "model.norm.weight", config.hidden_width)
    if not config.tied_embeddings:
        copy("output.weight", "lm_head.weight", config.vocab_size, config.hidden_width)
    writer.close()


def _layer_on_sample(block: Block, x: Tensor, rotation: tuple[Tensor, Tensor], sample: Tensor) -> tuple[Tensor, Tensor]:
    """x [N, C] before a layer -> x after it, and what its feed-forward network sees of it."""
    sequences, length = sample.shape
    pool = ops.new_pool(block.config.attention.spec, sequences, _BLOCK_TOKENS, dtype=torch.float32, device=_CPU)
    at = torch.arange(sequences)[:, None] * _BLOCK_TOKENS + torch.arange(length)
    metadata = AttentionMetadata(
        query_start=torch.arange(0, (sequences + 1) * length, length, dtype=torch.int32),
        context_lens=torch.full((sequences,), length, dtype=torch.int32),
        block_table=torch.arange(sequences, dtype=torch.int32)[:, None],
        slots=at.flatten(),
    )
    x = x + block.attention(block.attention_norm(x), rotation, pool, metadata)
    inputs = block.feed_forward_norm(x)
    assert isinstance(block.feed_forward, FeedForward)
    return x + block.feed_forward(inputs), inputs


def _config(checkpoint: Checkpoint, plan: _Plan, stored: torch.dtype) -> dict[str, Any]:
    config = checkpoint.config
    layer = config.layers[0]
    spec, rotary = layer.attention.spec, layer.attention.rotary
    assert rotary is not None
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": rotary.theta}
    if rotary.scaling is not None:
        rope |= {"rope_type": rotary.scaling.kind, "factor": rotary.scaling.factor}
        if rotary.scaling.kind == "llama3":
            rope |= {
                "low_freq_factor": rotary.scaling.low_freq_factor,
                "high_freq_factor": rotary.scaling.high_freq_factor,
                "original_max_position_embeddings": rotary.scaling.original_context,
            }
        if rotary.scaling.kind == "yarn":
            rope |= {
                "attention_factor": rotary.scaling.attention_factor,
                "beta_fast": rotary.scaling.beta_fast,
                "beta_slow": rotary.scaling.beta_slow,
                "truncate": rotary.scaling.truncate,
                "original_max_position_embeddings": rotary.scaling.original_context,
            }
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **_token_ids(checkpoint),
        "dtype": str(stored).removeprefix("torch."),
        "head_dim": spec.head_width,
        "hidden_act": "silu",
        "hidden_size": config.hidden_width,
        "intermediate_size": _feed_forward(checkpoint).width // plan.pieces,
        "max_position_embeddings": config.max_context,
        "num_attention_heads": spec.num_heads,
        "num_experts_per_tok": plan.top_k,
        "num_hidden_layers": len(config.layers),
        "num_key_value_heads": spec.num_kv_heads,
        "num_local_experts": plan.experts,
        "rms_norm_eps": layer.norm.eps,
        "rope_parameters": rope,
        "rope_theta": rotary.theta,
        "sliding_window": spec.window,
        "tie_word_embeddings": config.tied_embeddings,
        "vocab_size": config.vocab_size,
    }


def _token_ids(checkpoint: Checkpoint) -> dict[str, Any]:
    """Which tokens begin and end a text, as the source says it."""
    if checkpoint.path.is_dir():
        values = read_document(checkpoint.path).values
        return {name: values[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in values}
    tokenizer = load_tokenizer(checkpoint.path)
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": sorted(tokenizer.eos_ids)}


def _write_generation_config(checkpoint: Checkpoint, work: Path) -> None:
    if not checkpoint.path.is_dir():
        _write_json(work / "generation_config.json", _token_ids(checkpoint))
    elif (checkpoint.path / "generation_config.json").is_file():
        shutil.copyfile(checkpoint.path / "generation_config.json", work / "generation_config.json")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
