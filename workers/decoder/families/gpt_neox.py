"""GPT-NeoX and Pythia: both parts of a layer side by side, rotary positions over part of a head.

Black et al. 2022, arXiv 2204.06745.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from workers.decoder.config import DecoderConfig
from workers.decoder.families import gguf, llama
from workers.decoder.families.arrange import OfEachHead
from workers.decoder.families.document import Document
from workers.decoder.families.layer_norm import layer_norm_decoder
from workers.decoder.families.layers import with_attention
from workers.decoder.families.names import KINDS, named
from workers.decoder.families.rotary import read_rotary
from workers.decoder.storage import Source

MODEL_TYPES: tuple[str, ...] = ("gpt_neox",)
GGUF_ARCHITECTURES: tuple[str, ...] = ("gptneox",)

NAMES = {"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"}  # before transformers 5


def read_config(document: Document) -> DecoderConfig:
    document = document.renamed(NAMES)
    config = layer_norm_decoder(
        document,
        activation=document.choice("hidden_act", llama.ACTIVATIONS, "gelu"),
        eps=document.number("layer_norm_eps", 1e-5),
        inner=document.integer("intermediate_size"),
        tied=False,
    )
    layer = config.layers[0]
    bias = document.flag("attention_bias", True)
    rotary = read_rotary(document, layer.attention.spec.head_width, part=0.25)
    layer = with_attention(layer, rotary=rotary, qkv_bias=bias, output_bias=bias)
    parallel = document.flag("use_parallel_residual", True)
    layer = replace(layer, arrangement="parallel" if parallel else "sequential")
    return replace(config, layers=(layer,) * len(config.layers))


def sources(config: DecoderConfig, names: Collection[str]) -> dict[str, Source]:
    layer = {
        "attention_norm": "input_layernorm",
        "attention.output": "attention.dense",
        "feed_forward_norm": "post_attention_layernorm",
        "feed_forward.up": "mlp.dense_h_to_4h",
        "feed_forward.down": "mlp.dense_4h_to_h",
    }
    model = {"embedding": "gpt_neox.embed_in", "norm": "gpt_neox.final_layer_norm", "output": "embed_out"}
    found = named(config, model, "gpt_neox.layers.{}", layer)
    return found | fused_by_head(config, "gpt_neox.layers.{}.attention.query_key_value")


def fused_by_head(config: DecoderConfig, fused: str) -> dict[str, Source]:
    """Query, key and value out of one tensor in which each head's three lie together; {} stands for the layer."""
    found = {}
    for i, layer in enumerate(config.layers):
        for part, ours in enumerate(("query", "key", "value")):
            arrange = OfEachHead(part, 3, layer.attention.spec.num_heads)
            for kind in KINDS:
                found[f"layers.{i}.attention.{ours}.{kind}"] = Source(f"{fused.format(i)}.{kind}", arrange=arrange)
    return found


def gguf_document(model: gguf.GgufModel) -> Document:
    """The file does not say the activation; published NeoX models have the exact one ("gelu") or nearly so."""
    return model.document("gpt_neox", use_parallel_residual=model.own.flag("use_parallel_residual", True))


def gguf_sources(config: DecoderConfig, names: Collection[str]) -> dict[str, Source]:
    return gguf.sources(config, names)
