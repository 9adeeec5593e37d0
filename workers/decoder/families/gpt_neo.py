"""GPT-Neo: as GPT-2, with scores not scaled and a window in some layers (Black et al. 2021)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from workers.decoder.config import DecoderConfig, LayerConfig, PositionTableConfig
from workers.decoder.families import llama
from workers.decoder.families.document import Document
from workers.decoder.families.layer_norm import layer_norm_decoder
from workers.decoder.families.layers import each_layer, with_attention
from workers.decoder.families.names import named
from workers.decoder.storage import Source

MODEL_TYPES: tuple[str, ...] = ("gpt_neo",)

NAMES = {"num_heads": "num_attention_heads", "num_layers": "num_hidden_layers"}


def read_config(document: Document) -> DecoderConfig:
    document = document.renamed(NAMES)
    config = layer_norm_decoder(
        document,
        activation=document.choice("activation_function", llama.ACTIVATIONS, "gelu_new"),
        eps=document.number("layer_norm_epsilon", 1e-5),
        inner=document.integer("intermediate_size", 4 * document.integer("hidden_size")),
    )
    window, kinds = document.integer("window_size", 256), _kinds(document)

    def own_window(i: int, layer: LayerConfig) -> LayerConfig:
        spec = {"scale": 1.0, "window": window if kinds[i] == "local" else None}
        return with_attention(layer, spec=spec, qkv_bias=False)

    positions = PositionTableConfig(kind="learned", rows=config.max_context)
    return replace(each_layer(config, own_window), positions=positions)


def _kinds(document: Document) -> list[str]:
    """ "global" or "local" for each layer, from attention_types: [[["global", "local"], 12]] is 24 of them in turn."""
    num_layers = document.integer("num_hidden_layers")
    kinds: list[str] = []
    try:
        for turn, times in document.values.get("attention_types") or [[["global", "local"], 12]]:
            kinds += [str(kind) for kind in turn] * times
    except (TypeError, ValueError):
        kinds = []
    if len(kinds) != num_layers or not set(kinds) <= {"global", "local"}:
        raise document.wrong("attention_types", f'"global" or "local" for each of {num_layers} layers')
    return kinds


def sources(config: DecoderConfig, names: Collection[str]) -> dict[str, Source]:
    layer = {
        "attention_norm": "ln_1",
        "attention.query": "attn.attention.q_proj",
        "attention.key": "attn.attention.k_proj",
        "attention.value": "attn.attention.v_proj",
        "attention.output": "attn.attention.out_proj",
        "feed_forward_norm": "ln_2",
        "feed_forward.up": "mlp.c_fc",
        "feed_forward.down": "mlp.c_proj",
    }
    model = {
        "embedding": "transformer.wte",
        "positions": "transformer.wpe",
        "norm": "transformer.ln_f",
        "output": "lm_head",
    }
    return named(config, model, "transformer.h.{}", layer)
