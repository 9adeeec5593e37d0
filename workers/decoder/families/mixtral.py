"""Mixtral: Mistral whose feed-forward networks are experts (Jiang et al. 2024)."""

from __future__ import annotations

from collections.abc import Collection

from workers.decoder.config import DecoderConfig, ExpertsConfig, FeedForwardConfig, RouterConfig
from workers.decoder.families import llama
from workers.decoder.families.document import Document
from workers.decoder.families.expert_names import MIXTRAL_NAMES, either_sources
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
        ours, stacked, single = (
            f"layers.{i}.feed_forward",
            f"model.layers.{i}.mlp",
            f"model.layers.{i}.block_sparse_moe",
        )
        published = stacked if f"{stacked}.experts.gate_up_proj" in names else single
        found[f"{ours}.router.weight"] = Source(f"{published}.gate.weight")
        found |= either_sources(ours, layer.feed_forward, names, published, MIXTRAL_NAMES)
    return found
