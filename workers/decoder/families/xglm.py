"""XGLM: sinusoidal positions and scaled embeddings (Lin et al. 2022, arXiv 2112.10668)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from workers.decoder.config import DecoderConfig, PositionTableConfig
from workers.decoder.families import llama
from workers.decoder.families.document import Document
from workers.decoder.families.layer_norm import layer_norm_decoder
from workers.decoder.families.names import named
from workers.decoder.storage import Source

MODEL_TYPES: tuple[str, ...] = ("xglm",)

NAMES = {"d_model": "hidden_size", "attention_heads": "num_attention_heads", "num_layers": "num_hidden_layers"}
_OFFSET = 2  # fairseq's first position; the row of the padding token, 1 in all published models, lies below it
_EPS = 1e-5  # which no configuration says


def read_config(document: Document) -> DecoderConfig:
    document = document.renamed(NAMES)
    document.refuse({"add_cross_attention": False})
    padding = document.values.get("pad_token_id")
    if isinstance(padding, int) and padding >= _OFFSET:
        raise document.wrong("pad_token_id", f"below {_OFFSET}, since its position has no vector")
    config = layer_norm_decoder(
        document,
        activation=document.choice("activation_function", llama.ACTIVATIONS, "gelu"),
        eps=_EPS,
        inner=document.integer("ffn_dim"),
    )
    return replace(
        config,
        embedding_scale=config.hidden_width**0.5 if document.flag("scale_embedding", True) else 1.0,
        positions=PositionTableConfig(kind="sinusoidal", rows=config.max_context + _OFFSET, offset=_OFFSET),
    )


def sources(config: DecoderConfig, names: Collection[str]) -> dict[str, Source]:
    layer = {
        "attention_norm": "self_attn_layer_norm",
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.output": "self_attn.out_proj",
        "feed_forward_norm": "final_layer_norm",
        "feed_forward.up": "fc1",
        "feed_forward.down": "fc2",
    }
    model = {"embedding": "model.embed_tokens", "norm": "model.layer_norm", "output": "lm_head"}
    return named(config, model, "model.layers.{}", layer)
