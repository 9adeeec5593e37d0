"""Gemma 2: a second norm behind each part, soft-capped scores and logits, a window in every other layer.

Gemma Team 2024, arXiv 2408.00118.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

from workers.decoder.config import DecoderConfig
from workers.decoder.families import gemma, gguf, llama
from workers.decoder.families.document import Document
from workers.decoder.families.layers import each_layer, layer_windows, with_attention
from workers.decoder.families.names import named
from workers.decoder.storage import Source

MODEL_TYPES: tuple[str, ...] = ("gemma2",)
GGUF_ARCHITECTURES: tuple[str, ...] = ("gemma2",)

DEFAULTS = {
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True,
}
_LAYERS_OF_27B = 46


def read_config(document: Document) -> DecoderConfig:
    document = document.over(DEFAULTS)
    softcap = _positive(document, "attn_logit_softcapping")
    return each_layer(
        sandwiched(document, lambda i: i % 2 == 0), lambda _, layer: with_attention(layer, spec={"softcap": softcap})
    )


def sandwiched(document: Document, slides: Callable[[int], bool]) -> DecoderConfig:
    """What Gemma 2 and 3 share. `slides`: whether layer i has a window where the configuration lists no layers."""
    document.refuse({"use_bidirectional_attention": False})
    feed_forward = replace(
        llama.gated_feed_forward(document),
        activation=document.choice("hidden_activation", llama.ACTIVATIONS, "gelu_pytorch_tanh"),
    )
    num_layers = document.integer("num_hidden_layers")
    config = llama.llama_like(
        document,
        feed_forward,
        windows=layer_windows(document, num_layers, slides, document.integer("sliding_window")),
        attention_bias=document.flag("attention_bias", False),
    )
    if (width := document.number("query_pre_attn_scalar")) <= 0:
        raise document.wrong("query_pre_attn_scalar", "a number above 0")
    scale = width**-0.5
    return replace(
        each_layer(
            config, lambda _, layer: replace(with_attention(layer, spec={"scale": scale}), arrangement="sandwich")
        ),
        embedding_scale=config.hidden_width**0.5,
        logit_softcap=_positive(document, "final_logit_softcapping"),
    )


def _positive(document: Document, key: str) -> float | None:
    """A bound; null is none."""
    if key not in document:
        return None
    value = document.number(key)
    if value <= 0:
        raise document.wrong(key, "a number above 0, or null")
    return value


def sources(config: DecoderConfig, names: Collection[str]) -> dict[str, Source]:
    layer = {
        "attention_post_norm": "post_attention_layernorm",
        "feed_forward_norm": "pre_feedforward_layernorm",
        "feed_forward_post_norm": "post_feedforward_layernorm",
    }
    return gemma.with_full_norms(llama.sources(config, names) | named(config, {}, "model.layers.{}", layer))


def gguf_document(model: gguf.GgufModel) -> Document:
    own = model.own
    return model.document(
        "gemma2",
        query_pre_attn_scalar=score_width(model, _LAYERS_OF_27B),
        attn_logit_softcapping=own.number("attn_logit_softcapping", 50.0),
        final_logit_softcapping=own.number("final_logit_softcapping", 30.0),
    )


def score_width(model: gguf.GgufModel, layers_of_27b: int) -> int:
    """By whose root scores are divided: of the 27B the model width a head, known by its layers as in llama.cpp."""
    if model.own.integer("block_count") == layers_of_27b:
        return model.own.integer("embedding_length") // model.own.integer("attention.head_count")
    return model.head_width


def gguf_sources(config: DecoderConfig, names: Collection[str]) -> dict[str, Source]:
    return gguf.sources(config, names)
