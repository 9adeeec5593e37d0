"""BLOOM: ALiBi in place of positions, and a norm behind the embedding (BigScience 2022, arXiv 2211.05100)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from workers.decoder.config import DecoderConfig
from workers.decoder.families import gguf
from workers.decoder.families.document import Document
from workers.decoder.families.gpt_neox import fused_by_head
from workers.decoder.families.layer_norm import alibi_slopes, layer_norm_decoder
from workers.decoder.families.layers import with_attention
from workers.decoder.families.names import named
from workers.decoder.storage import Source

MODEL_TYPES: tuple[str, ...] = ("bloom",)
GGUF_ARCHITECTURES: tuple[str, ...] = ("bloom",)

NAMES = {
    "n_embed": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "seq_length": "max_position_embeddings",
}


def read_config(document: Document) -> DecoderConfig:
    """ALiBi itself knows no longest context; 2048 tokens are what the models were trained with."""
    document = document.renamed(NAMES).over({"max_position_embeddings": 2048})
    document.refuse({"apply_residual_connection_post_layernorm": False})
    config = layer_norm_decoder(
        document,
        activation="gelu_tanh",
        eps=document.number("layer_norm_epsilon", 1e-5),
        inner=4 * document.integer("hidden_size"),
    )
    slopes = alibi_slopes(config.layers[0].attention.spec.num_heads)
    layer = with_attention(config.layers[0], spec={"alibi_slopes": slopes})
    return replace(config, layers=(layer,) * len(config.layers), embedding_norm=config.norm)


def sources(config: DecoderConfig, names: Collection[str]) -> dict[str, Source]:
    """Under "transformer.", or without it as BigScience's own files are."""
    prefix = "transformer." if "transformer.word_embeddings.weight" in names else ""
    layer = {
        "attention_norm": "input_layernorm",
        "attention.output": "self_attention.dense",
        "feed_forward_norm": "post_attention_layernorm",
        "feed_forward.up": "mlp.dense_h_to_4h",
        "feed_forward.down": "mlp.dense_4h_to_h",
    }
    model = {
        "embedding": f"{prefix}word_embeddings",
        "embedding_norm": f"{prefix}word_embeddings_layernorm",
        "norm": f"{prefix}ln_f",
    }
    found = named(config, model, f"{prefix}h.{{}}", layer)
    found["output.weight"] = Source("lm_head.weight")
    return found | fused_by_head(config, f"{prefix}h.{{}}.self_attention.query_key_value")


def gguf_document(model: gguf.GgufModel) -> Document:
    return model.document("bloom", layer_norm_epsilon=model.own.number("attention.layer_norm_epsilon"))


def gguf_sources(config: DecoderConfig, names: Collection[str]) -> dict[str, Source]:
    return gguf.sources(config, names)
