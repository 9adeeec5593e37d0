"""gpt-oss (OpenAI 2025): attention sinks, every other layer with a window, biases everywhere, experts in MXFP4."""

from __future__ import annotations

from collections.abc import Collection

from workers.decoder.config import (
    ClampedSwiGLU,
    DecoderConfig,
    ExpertsConfig,
    FeedForwardConfig,
    RouterConfig,
)
from workers.decoder.families import gguf, llama
from workers.decoder.families.arrange import Turned
from workers.decoder.families.document import Document
from workers.decoder.families.layers import each_layer, layer_windows, with_attention
from workers.decoder.storage import Source

MODEL_TYPES: tuple[str, ...] = ("gpt_oss",)
GGUF_ARCHITECTURES: tuple[str, ...] = ("gpt-oss",)
QUANTIZATIONS: tuple[str, ...] = ("mxfp4",)

# What transformers takes where a configuration says nothing of rotary positions.
_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def read_config(document: Document) -> DecoderConfig:
    experts = ExpertsConfig(
        router=RouterConfig(
            num_experts=document.integer("num_local_experts", 128),
            top_k=document.integer("num_experts_per_tok", 4),
            scores="softmax_chosen",
            bias=True,
        ),
        expert=FeedForwardConfig(
            width=document.integer("intermediate_size", 2880),
            activation=ClampedSwiGLU(
                alpha=document.number("swiglu_alpha", 1.702), limit=document.number("swiglu_limit", 7.0)
            ),
            bias=True,
        ),
    )
    if "rope_parameters" not in document and "rope_scaling" not in document:
        document = Document(document.where, {**document.values, "rope_scaling": _ROPE})
    bias = document.flag("attention_bias", True)
    window = document.integer("sliding_window", 128)
    windows = layer_windows(document, document.integer("num_hidden_layers"), lambda i: i % 2 == 0, window)
    config = llama.llama_like(document, experts, windows=windows, attention_bias=bias, theta=150_000.0, eps=1e-5)
    return each_layer(config, lambda _, layer: with_attention(layer, sinks=True))


def sources(config: DecoderConfig, names: Collection[str]) -> dict[str, Source]:
    """Experts as published, in MXFP4 with gate and up rows in turns, or transposed as transformers holds them."""
    found = llama.shared_sources(config)
    for i, layer in enumerate(config.layers):
        assert isinstance(layer.feed_forward, ExpertsConfig)
        ours, mlp = f"layers.{i}.feed_forward", f"model.layers.{i}.mlp"
        found[f"layers.{i}.attention.sinks"] = Source(f"model.layers.{i}.self_attn.sinks")
        for kind in ("weight", "bias"):
            found[f"{ours}.router.{kind}"] = Source(f"{mlp}.router.{kind}")
        gate_up, down, width = (
            f"{mlp}.experts.gate_up_proj",
            f"{mlp}.experts.down_proj",
            layer.feed_forward.expert.width,
        )
        for e in range(layer.feed_forward.router.num_experts):
            own = f"{ours}.experts.{e}"
            for first, name in enumerate(("gate", "up")):
                rows = (first, 2 * width)
                found[f"{own}.{name}.bias"] = Source(f"{gate_up}_bias", at=e, rows=rows, step=2)
                found[f"{own}.{name}.weight"] = (
                    Source(f"{gate_up}_blocks", at=e, rows=rows, step=2, scales=f"{gate_up}_scales")
                    if f"{gate_up}_blocks" in names
                    else Source(gate_up, at=e, arrange=Turned(first, step=2))
                )
            found[f"{own}.down.bias"] = Source(f"{down}_bias", at=e)
            found[f"{own}.down.weight"] = (
                Source(f"{down}_blocks", at=e, scales=f"{down}_scales")
                if f"{down}_blocks" in names
                else Source(down, at=e, arrange=Turned())
            )
    return found


def gguf_document(model: gguf.GgufModel) -> Document:
    own, scaling = model.own, model.rope_scaling()
    return model.document(
        "gpt_oss",
        num_local_experts=own.integer("expert_count"),
        num_experts_per_tok=own.integer("expert_used_count"),
        intermediate_size=own.integer("expert_feed_forward_length"),
        rope_scaling=None if scaling is None else {**scaling, "truncate": False},
    )


def gguf_sources(config: DecoderConfig, names: Collection[str]) -> dict[str, Source]:
    found = gguf.sources(config, names)
    for i in range(len(config.layers)):
        found[f"layers.{i}.feed_forward_norm.weight"] = Source(f"blk.{i}.post_attention_norm.weight")
    return found
