"""Llama, and what its descendants share with it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Literal

from workers.decoder.attention import AttentionSpec
from workers.decoder.config import (
    AttentionConfig,
    DecoderConfig,
    ExpertsConfig,
    FeedForwardConfig,
    LayerConfig,
    NormConfig,
)
from workers.decoder.families import gguf
from workers.decoder.families.document import Document
from workers.decoder.families.names import named
from workers.decoder.families.rotary import read_rotary
from workers.decoder.storage import Source

MODEL_TYPES: tuple[str, ...] = ("llama",)
GGUF_ARCHITECTURES: tuple[str, ...] = ("llama",)
GGUF_MODEL_TYPES: tuple[str, ...] = ("llama", "mistral", "mixtral")  # what such a file may hold

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def read_config(document: Document) -> DecoderConfig:
    feed_forward = gated_feed_forward(document, bias=document.flag("mlp_bias", False))
    return llama_like(document, feed_forward, attention_bias=document.flag("attention_bias", False))


def llama_like(
    document: Document,
    feed_forward: FeedForwardConfig | ExpertsConfig,
    *,
    window: int | None = None,
    windows: Sequence[int | None] | None = None,
    attention_bias: bool = False,
    qkv_bias: bool = False,
    query_key_norm: Literal["head", "projection"] | None = None,
    theta: float = 10_000.0,
    eps: float = 1e-6,
    tied: bool = False,
) -> DecoderConfig:
    """Equal layers with RMSNorm and rotary positions, `windows` apart where they are given a layer.

    `theta`, `eps` and `tied` are the architecture's defaults. `query_key_norm` says over what queries and keys are
    normed. `attention_bias` is of all four projections, `qkv_bias` of the three.
    """
    hidden_width = document.integer("hidden_size")
    num_heads = document.integer("num_attention_heads")
    head_width = document.integer("head_dim", hidden_width // num_heads)
    norm = NormConfig(eps=document.number("rms_norm_eps", eps))
    spec = AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=document.integer("num_key_value_heads", num_heads),
        head_width=head_width,
        value_width=head_width,
        scale=head_width**-0.5,
    )
    attention = AttentionConfig(
        spec=spec,
        rotary=read_rotary(document, head_width, theta=theta),
        qkv_bias=attention_bias or qkv_bias,
        output_bias=attention_bias,
        query_key_norm=norm if query_key_norm else None,
        norm_over=query_key_norm or "head",
    )
    layer = LayerConfig(attention=attention, feed_forward=feed_forward, norm=norm)
    if windows is None:
        windows = (window,) * document.integer("num_hidden_layers")
    return DecoderConfig(
        architecture=document.text("model_type"),
        vocab_size=document.integer("vocab_size"),
        hidden_width=hidden_width,
        max_context=document.integer("max_position_embeddings"),
        layers=tuple(
            replace(layer, attention=replace(attention, spec=replace(spec, window=window))) for window in windows
        ),
        norm=norm,
        tied_embeddings=document.flag("tie_word_embeddings", tied),
    )


def gated_feed_forward(document: Document, *, activation: str = "silu", bias: bool = False) -> FeedForwardConfig:
    return FeedForwardConfig(
        width=document.integer("intermediate_size"),
        activation=document.choice("hidden_act", ACTIVATIONS, activation),
        bias=bias,
    )


def sources(config: DecoderConfig, names: Collection[str]) -> dict[str, Source]:
    found = shared_sources(config)
    for i in range(len(config.layers)):
        for ours in ("gate", "up", "down"):
            for kind in ("weight", "bias"):
                published = f"model.layers.{i}.mlp.{ours}_proj.{kind}"
                found[f"layers.{i}.feed_forward.{ours}.{kind}"] = Source(published)
    return found


def shared_sources(config: DecoderConfig) -> dict[str, Source]:
    """Embeddings, norms and attention under Llama's names; the feed-forward part is each family's own."""
    layer = {
        "attention_norm": "input_layernorm",
        "feed_forward_norm": "post_attention_layernorm",
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.output": "self_attn.o_proj",
        "attention.query_norm": "self_attn.q_norm",
        "attention.key_norm": "self_attn.k_norm",
    }
    model = {"embedding": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
    return named(config, model, "model.layers.{}", layer)


def gguf_document(model: gguf.GgufModel) -> Document:
    experts = model.own.values.get("expert_count")
    if not experts:
        return model.document("llama", attention_bias="blk.0.attn_q.bias" in model)
    return model.document(
        "mixtral",
        num_local_experts=model.own.integer("expert_count"),
        num_experts_per_tok=model.own.integer("expert_used_count"),
    )


def gguf_sources(config: DecoderConfig, names: Collection[str]) -> dict[str, Source]:
    return gguf.sources(config, names, pairs_apart=False)
