"""Mixtral: Mistral whose feed-forward networks are experts (Jiang et al. 2024)."""

from __future__ import annotations

from collections.abc import Collection

from workers.decoder.config import DecoderConfig, ExpertsConfig, FeedForwardConfig, RouterConfig
from workers.decoder.families import llama
from workers.decoder.families.document import Document
from workers.decoder.storage import Source

MODEL_TYPES: tuple[str, ...] = ("mixtral",)


def read_config(document: Document) -> DecoderConfig:
    experts = ExpertsConfig(
        router=RouterConfig(
            num_experts=document.integer("num_local_experts", 8),
            top_k=document.integer("num_experts_per_tok", 2),
            renormalise=True,
        ),
        expert=FeedForwardConfig(
            width=document.integer("intermediate_size"),
            activation=document.choice("hidden_act", llama.ACTIVATIONS, "silu"),
        ),
    )
    window = document.optional_integer("sliding_window")
    return llama.llama_like(document, experts, window=window, theta=1e6, eps=1e-5)


def sources(config: DecoderConfig, names: Collection[str]) -> dict[str, Source]:
    """Experts one by one (w1, w2, w3), as published, or stacked (gate_up_proj), as in transformers 5's memory."""
    found = llama.shared_sources(config)
    for i, layer in enumerate(config.layers):
        assert isinstance(layer.feed_forward, ExpertsConfig)
        ours = f"layers.{i}.feed_forward"
        stacked = f"model.layers.{i}.mlp"
        if f"{stacked}.experts.gate_up_proj" in names:
            found[f"{ours}.router.weight"] = Source(f"{stacked}.gate.weight")
            width = layer.feed_forward.expert.width
            for e in range(layer.feed_forward.router.num_experts):
                both = f"{stacked}.experts.gate_up_proj"
                found[f"{ours}.experts.{e}.gate.weight"] = Source(both, at=e, rows=(0, width))
                found[f"{ours}.experts.{e}.up.weight"] = Source(both, at=e, rows=(width, 2 * width))
                found[f"{ours}.experts.{e}.down.weight"] = Source(f"{stacked}.experts.down_proj", at=e)
            continue
        single = f"model.layers.{i}.block_sparse_moe"
        found[f"{ours}.router.weight"] = Source(f"{single}.gate.weight")
        for e in range(layer.feed_forward.router.num_experts):
            for name, published in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
                found[f"{ours}.experts.{e}.{name}.weight"] = Source(f"{single}.experts.{e}.{published}.weight")
    return found
