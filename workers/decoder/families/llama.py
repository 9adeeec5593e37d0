"""Llama, and what its descendants share with it."""

from __future__ import annotations

from collections.abc import Collection

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
from workers.decoder.families.rotary import read_rotary
from workers.decoder.storage import Source

MODEL_TYPES: tuple[str, ...] = ("llama",)
GGUF_ARCHITECTURES: tuple[str, ...] = ("llama",)  # Llama, Mistral and Mixtral alike

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def read_config(document: Document) -> DecoderConfig:
    feed_forward = FeedForwardConfig(
        width=document.integer("intermediate_size"),
        activation=document.choice("hidden_act", ACTIVATIONS, "silu"),
        bias=document.flag("mlp_bias", False),
    )
    return llama_like(document, feed_forward, attention_bias=document.flag("attention_bias", False))


def llama_like(
    document: Document,
    feed_forward: FeedForwardConfig | ExpertsConfig,
    *,
    window: int | None = None,
    attention_bias: bool = False,
    theta: float = 10_000.0,
    eps: float = 1e-6,
) -> DecoderConfig:
    """Equal layers with RMSNorm and rotary positions. `theta` and `eps` are the architecture's defaults."""
    hidden_width = document.integer("hidden_size")
    num_heads = document.integer("num_attention_heads")
    head_width = document.integer("head_dim", hidden_width // num_heads)
    norm = NormConfig(eps=document.number("rms_norm_eps", eps))
    layer = LayerConfig(
        attention=AttentionConfig(
            spec=AttentionSpec(
                num_heads=num_heads,
                num_kv_heads=document.integer("num_key_value_heads", num_heads),
                head_width=head_width,
                value_width=head_width,
                scale=head_width**-0.5,
                window=window,
            ),
            rotary=read_rotary(document, head_width, theta=theta),
            qkv_bias=attention_bias,
            output_bias=attention_bias,
        ),
        feed_forward=feed_forward,
        norm=norm,
    )
    return DecoderConfig(
        architecture=document.text("model_type"),
        vocab_size=document.integer("vocab_size"),
        hidden_width=hidden_width,
        max_context=document.integer("max_position_embeddings"),
        layers=(layer,) * document.integer("num_hidden_layers"),
        norm=norm,
        tied_embeddings=document.flag("tie_word_embeddings", False),
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
    found = {
        "embedding.weight": Source("model.embed_tokens.weight"),
        "norm.weight": Source("model.norm.weight"),
        "output.weight": Source("lm_head.weight"),
    }
    for i in range(len(config.layers)):
        ours, published = f"layers.{i}", f"model.layers.{i}"
        found[f"{ours}.attention_norm.weight"] = Source(f"{published}.input_layernorm.weight")
        found[f"{ours}.feed_forward_norm.weight"] = Source(f"{published}.post_attention_layernorm.weight")
        for name, letter in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o")):
            for kind in ("weight", "bias"):
                found[f"{ours}.attention.{name}.{kind}"] = Source(f"{published}.self_attn.{letter}_proj.{kind}")
    return found


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
