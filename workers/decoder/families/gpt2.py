"""GPT-2: learned positions, and matrices stored [in, out] (Radford et al. 2019)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from workers.decoder.config import DecoderConfig, LayerConfig, PositionTableConfig
from workers.decoder.families import gguf, llama
from workers.decoder.families.arrange import Turned
from workers.decoder.families.document import Document
from workers.decoder.families.layer_norm import layer_norm_decoder
from workers.decoder.families.layers import each_layer, with_attention
from workers.decoder.families.names import named
from workers.decoder.storage import Source

MODEL_TYPES: tuple[str, ...] = ("gpt2",)
GGUF_ARCHITECTURES: tuple[str, ...] = ("gpt2",)

NAMES = {
    "n_embd": "hidden_size",
    "n_positions": "max_position_embeddings",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
}


def read_config(document: Document) -> DecoderConfig:
    document = document.renamed(NAMES)
    document.refuse({"add_cross_attention": False})
    config = layer_norm_decoder(
        document,
        activation=document.choice("activation_function", llama.ACTIVATIONS, "gelu_new"),
        eps=document.number("layer_norm_epsilon", 1e-5),
        inner=document.integer("n_inner", 4 * document.integer("hidden_size")),
    )
    scaled = document.flag("scale_attn_weights", True)
    by_layer = document.flag("scale_attn_by_inverse_layer_idx", False)

    def own_scale(i: int, layer: LayerConfig) -> LayerConfig:
        scale = layer.attention.spec.scale if scaled else 1.0
        return with_attention(layer, spec={"scale": scale / (i + 1) if by_layer else scale})

    positions = PositionTableConfig(kind="learned", rows=config.max_context)
    return replace(each_layer(config, own_scale), positions=positions)


def sources(config: DecoderConfig, names: Collection[str]) -> dict[str, Source]:
    """Under "transformer.", or without it as OpenAI's own files are."""
    prefix = "transformer." if "transformer.wte.weight" in names else ""
    layer = {
        "attention_norm": "ln_1",
        "attention.output": "attn.c_proj",
        "feed_forward_norm": "ln_2",
        "feed_forward.up": "mlp.c_fc",
        "feed_forward.down": "mlp.c_proj",
    }
    model = {
        "embedding": f"{prefix}wte",
        "positions": f"{prefix}wpe",
        "norm": f"{prefix}ln_f",
    }
    found = named(config, model, f"{prefix}h.{{}}", layer)
    found["output.weight"] = Source("lm_head.weight")
    width = config.hidden_width
    for i in range(len(config.layers)):
        for ours in ("attention.output", "feed_forward.up", "feed_forward.down"):
            name = f"layers.{i}.{ours}.weight"
            found[name] = replace(found[name], arrange=Turned())
        for part, ours in enumerate(("query", "key", "value")):
            fused, begin, end = f"{prefix}h.{i}.attn.c_attn", part * width, (part + 1) * width
            found[f"layers.{i}.attention.{ours}.weight"] = Source(f"{fused}.weight", arrange=Turned(begin, end))
            found[f"layers.{i}.attention.{ours}.bias"] = Source(f"{fused}.bias", rows=(begin, end))
    return found


def gguf_document(model: gguf.GgufModel) -> Document:
    epsilon = model.own.number("attention.layer_norm_epsilon")
    return model.document("gpt2", n_inner=model.own.integer("feed_forward_length"), layer_norm_epsilon=epsilon)


def gguf_sources(config: DecoderConfig, names: Collection[str]) -> dict[str, Source]:
    return gguf.sources(config, names)
