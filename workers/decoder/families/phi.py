"""Phi-1, 1.5 and 2: attention and feed-forward side by side behind one norm, rotary positions over part of a head.

Li et al. 2023, arXiv 2309.05463.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from workers.decoder.config import DecoderConfig
from workers.decoder.families import gguf, llama
from workers.decoder.families.document import Document
from workers.decoder.families.layer_norm import layer_norm_decoder
from workers.decoder.families.layers import with_attention
from workers.decoder.families.names import named
from workers.decoder.families.rotary import read_rotary
from workers.decoder.storage import Source

MODEL_TYPES: tuple[str, ...] = ("phi",)
GGUF_ARCHITECTURES: tuple[str, ...] = ("phi2",)


def read_config(document: Document) -> DecoderConfig:
    config = layer_norm_decoder(
        document,
        activation=document.choice("hidden_act", llama.ACTIVATIONS, "gelu_new"),
        eps=document.number("layer_norm_eps", 1e-5),
        inner=document.integer("intermediate_size", 4 * document.integer("hidden_size")),
        tied=False,
    )
    layer = config.layers[0]
    spec = layer.attention.spec
    layer = with_attention(
        layer,
        spec={"num_kv_heads": document.integer("num_key_value_heads", spec.num_heads)},
        rotary=read_rotary(document, spec.head_width, part=0.5),
        query_key_norm=layer.norm if document.flag("qk_layernorm", False) else None,
    )
    layers = (replace(layer, arrangement="parallel_shared"),) * len(config.layers)
    return replace(config, layers=layers, output_bias=True)


def sources(config: DecoderConfig, names: Collection[str]) -> dict[str, Source]:
    layer = {
        "attention_norm": "input_layernorm",
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.output": "self_attn.dense",
        "attention.query_norm": "self_attn.q_layernorm",
        "attention.key_norm": "self_attn.k_layernorm",
        "feed_forward.up": "mlp.fc1",
        "feed_forward.down": "mlp.fc2",
    }
    model = {"embedding": "model.embed_tokens", "norm": "model.final_layernorm", "output": "lm_head"}
    return named(config, model, "model.layers.{}", layer)


def gguf_document(model: gguf.GgufModel) -> Document:
    return model.document("phi")


def gguf_sources(config: DecoderConfig, names: Collection[str]) -> dict[str, Source]:
    return gguf.sources(config, names)
