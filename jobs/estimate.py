"""What a model costs: weights, KV cache and arithmetic, counted from its configuration alone. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from workers.decoder.config import DecoderConfig, ExpertsConfig, FeedForwardConfig, LayerConfig

# The share of this machine's large float32 matrix product that a whole step reaches: measured with SmolLM2-135M and its
# upcycled form, prefill and decode in batches of 64 and more.
EFFICIENCY = 0.6


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCost:
    """Numbers of weights, and bytes of cache a token. Norms and biases, below a thousandth, are left out."""

    weights: int
    weights_a_token: int  # that one token meets: attention, its own experts; neither embedding nor output
    output_weights: int  # met by each token whose successor is chosen
    cache_values_a_token: int  # keys and values in all layers, windows aside
    attention_values_a_token: int  # query and value columns in all layers: 2 FLOP each for every token attended to

    def flops(self, *, tokens: int, chosen: int, context: float) -> float:
        """Of `tokens` tokens that attend to `context` others on average, `chosen` of which yield a next token."""
        attention = 2 * self.attention_values_a_token * context
        return tokens * (2.0 * self.weights_a_token + attention) + 2.0 * chosen * self.output_weights


def model_cost(config: DecoderConfig) -> ModelCost:
    width, vocab = config.hidden_width, config.vocab_size
    layers = [_layer_weights(layer, width) for layer in config.layers]
    specs = [layer.attention.spec for layer in config.layers]
    output = vocab * width
    return ModelCost(
        weights=sum(held for held, _ in layers) + output * (1 if config.tied_embeddings else 2),
        weights_a_token=sum(met for _, met in layers),
        output_weights=output,
        cache_values_a_token=sum(spec.num_kv_heads * (spec.head_width + spec.value_width) for spec in specs),
        attention_values_a_token=sum(spec.num_heads * (spec.head_width + spec.value_width) for spec in specs),
    )


def _layer_weights(layer: LayerConfig, width: int) -> tuple[int, int]:
    """(held, met by one token)."""
    spec, forward = layer.attention.spec, layer.feed_forward
    attention = width * (
        spec.num_heads * (spec.head_width + spec.value_width) + spec.num_kv_heads * (spec.head_width + spec.value_width)
    )
    if hasattr(forward, "router"):
        experts: ExpertsConfig = forward
        one, router = _feed_forward_weights(experts.expert, width), width * experts.router.num_experts
        return (
            attention + router + experts.router.num_experts * one,
            attention + router + experts.router.top_k * one,
        )
    return (attention + _feed_forward_weights(forward, width),) * 2


def _feed_forward_weights(config: FeedForwardConfig, width: int) -> int:
    return (3 if config.gated else 2) * width * config.width
