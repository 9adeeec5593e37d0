"""Qwen2-MoE: experts beside a shared one behind a gate (Yang et al. 2024), and what Qwen3-MoE has in common with it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from workers.decoder.config import DecoderConfig, ExpertsConfig, FeedForwardConfig, LayerConfig, RouterConfig
from workers.decoder.families import gguf, llama
from workers.decoder.families.document import Document
from workers.decoder.families.expert_names import LLAMA_NAMES, either_sources
from workers.decoder.families.layers import each_layer, layer_windows
from workers.decoder.storage import Source

MODEL_TYPES: tuple[str, ...] = ("qwen2_moe",)
GGUF_ARCHITECTURES: tuple[str, ...] = ("qwen2moe",)


def read_config(document: Document) -> DecoderConfig:
    activation = document.choice("hidden_act", llama.ACTIVATIONS, "silu")
    experts = ExpertsConfig(
        router=read_router(document, num_experts=60, top_k=4),
        expert=FeedForwardConfig(width=document.integer("moe_intermediate_size", 1408), activation=activation),
        shared=FeedForwardConfig(
            width=document.integer("shared_expert_intermediate_size", 5632), activation=activation
        ),
        shared_gate=True,
    )
    window = document.integer("sliding_window", 4096) if document.flag("use_sliding_window", False) else None
    upper = document.count("max_window_layers", 28)
    windows = layer_windows(document, document.integer("num_hidden_layers"), lambda i: i % 2 == 0 and i < upper, window)
    bias = document.flag("qkv_bias", True)
    return with_dense_layers(document, llama.llama_like(document, experts, windows=windows, qkv_bias=bias))


def read_router(document: Document, *, num_experts: int, top_k: int) -> RouterConfig:
    """The last two are the architecture's defaults."""
    # The second is Qwen3-MoE's, as transformers 5 writes it.
    key = "num_local_experts" if "num_local_experts" in document else "num_experts"
    return RouterConfig(
        num_experts=document.integer(key, num_experts),
        top_k=document.integer("num_experts_per_tok", top_k),
        renormalise=document.flag("norm_topk_prob", False),
    )


def with_dense_layers(document: Document, config: DecoderConfig) -> DecoderConfig:
    """`config` with a dense feed-forward network in each layer where the configuration wants one."""
    listed, step = document.counts("mlp_only_layers"), document.integer("decoder_sparse_step", 1)

    def layer(i: int, sparse: LayerConfig) -> LayerConfig:
        if i not in listed and (i + 1) % step == 0:
            return sparse
        return replace(sparse, feed_forward=llama.gated_feed_forward(document))

    return each_layer(config, layer)


def sources(config: DecoderConfig, names: Collection[str]) -> dict[str, Source]:
    found = llama.sources(config, names)  # the dense layers' feed-forward names among them
    for i, layer in enumerate(config.layers):
        ours, mlp = f"layers.{i}.feed_forward", f"model.layers.{i}.mlp"
        for norm in ("query", "key"):  # Qwen3-MoE, OLMoE
            found[f"layers.{i}.attention.{norm}_norm.weight"] = Source(
                f"model.layers.{i}.self_attn.{norm[0]}_norm.weight"
            )
        if not isinstance(layer.feed_forward, ExpertsConfig):
            continue
        found[f"{ours}.router.weight"] = Source(f"{mlp}.gate.weight")
        found |= either_sources(ours, layer.feed_forward, names, mlp, LLAMA_NAMES)
        for name, published in LLAMA_NAMES.items():
            found[f"{ours}.shared.{name}.weight"] = Source(f"{mlp}.shared_expert.{published}.weight")
        found[f"{ours}.shared_gate.weight"] = Source(f"{mlp}.shared_expert_gate.weight")
    return found


def gguf_document(model: gguf.GgufModel) -> Document:
    own = model.own
    return model.document(
        "qwen2_moe",
        num_experts=own.integer("expert_count"),
        num_experts_per_tok=own.integer("expert_used_count"),
        moe_intermediate_size=own.integer("expert_feed_forward_length"),
        shared_expert_intermediate_size=own.integer(
            "expert_shared_feed_forward_length", model.rows("blk.0.ffn_up_shexp.weight")
        ),
        norm_topk_prob=own.flag("expert_weights_norm", False),
        qkv_bias="blk.0.attn_q.bias" in model,
    )


def gguf_sources(config: DecoderConfig, names: Collection[str]) -> dict[str, Source]:
    return gguf.sources(config, names)
