"""MPT: ALiBi, no biases, query, key and value in one tensor (MosaicML 2023)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from workers.decoder.config import DecoderConfig
from workers.decoder.families import gguf
from workers.decoder.families.document import Document
from workers.decoder.families.layer_norm import alibi_slopes, layer_norm_decoder
from workers.decoder.families.layers import with_attention
from workers.decoder.families.names import named
from workers.decoder.storage import Source

MODEL_TYPES: tuple[str, ...] = ("mpt",)
GGUF_ARCHITECTURES: tuple[str, ...] = ("mpt",)

NAMES = {
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_layers": "num_hidden_layers",
    "max_seq_len": "max_position_embeddings",
}


def read_config(document: Document) -> DecoderConfig:
    """learned_pos_emb says nothing where there is ALiBi; models without ALiBi are refused."""
    document = document.renamed(NAMES)
    document.refuse({"no_bias": True, "logit_scale": None, "norm_type": "low_precision_layernorm"})
    attention = document.inner("attn_config")
    attention.refuse({"attn_type": "multihead_attention", "prefix_lm": False, "qk_ln": False, "alibi": True})
    config = layer_norm_decoder(
        document,
        activation="gelu",
        eps=document.number("layer_norm_epsilon", 1e-5),
        inner=document.integer("expansion_ratio", 4) * document.integer("hidden_size"),
        bias=False,
    )
    spec = config.layers[0].attention.spec
    slopes = alibi_slopes(spec.num_heads, attention.number("alibi_bias_max", 8.0))
    layer = with_attention(
        config.layers[0],
        spec={"alibi_slopes": slopes, "scale": attention.number("softmax_scale", spec.scale)},
        clip_qkv=attention.number("clip_qkv") if "clip_qkv" in attention else None,
    )
    return replace(config, layers=(layer,) * len(config.layers))


def sources(config: DecoderConfig, names: Collection[str]) -> dict[str, Source]:
    layer = {
        "attention_norm": "norm_1",
        "attention.output": "attn.out_proj",
        "feed_forward_norm": "norm_2",
        "feed_forward.up": "ffn.up_proj",
        "feed_forward.down": "ffn.down_proj",
    }
    model = {"embedding": "transformer.wte", "norm": "transformer.norm_f", "output": "lm_head"}
    found = named(config, model, "transformer.blocks.{}", layer)
    width = config.hidden_width
    for i in range(len(config.layers)):
        for part, ours in enumerate(("query", "key", "value")):
            fused = f"transformer.blocks.{i}.attn.Wqkv.weight"
            found[f"layers.{i}.attention.{ours}.weight"] = Source(fused, rows=(part * width, (part + 1) * width))
    return found


def gguf_document(model: gguf.GgufModel) -> Document:
    own = model.own
    largest = own.number("attention.max_alibi_bias", 0.0)
    attention = {"alibi": largest > 0, "alibi_bias_max": largest, "clip_qkv": own.values.get("attention.clamp_kqv")}
    return model.document(
        "mpt", attn_config=attention, layer_norm_epsilon=own.number("attention.layer_norm_epsilon", 1e-5)
    )


def gguf_sources(config: DecoderConfig, names: Collection[str]) -> dict[str, Source]:
    return gguf.sources(config, names)
