"""What a model would take of this machine, told before it is loaded: memory, arithmetic, how fast that goes here."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from pipeline.errors import UserError
from workers.decoder.attention_choice import describe_attention, with_attention
from workers.decoder.checkpoint import load_checkpoint
from workers.decoder.config import (
    AttentionConfig,
    DecoderConfig,
    ExpertsConfig,
    FeedForwardConfig,
    LatentAttentionConfig,
    LayerConfig,
)
from workers.decoder.describe import describe
from workers.decoder.kernels import build
from workers.decoder.model import layer_groups, router_width
from workers.decoder.precision import resolve_precision
from workers.engine.engine import BLOCK_TOKENS, MAX_SEQUENCES, STEP_TOKENS
from workers.engine.kv_cache import CacheShape, GroupNeed, auto_budget_bytes
from workers.settings import EngineSettings

# The share of a large float32 matrix product's speed that whole steps are taken to reach, prefill and decode in batches
# of 64 and more. An estimate, to be checked against `python -m benchmarks.generation` on the machine that matters.
EFFICIENCY = 0.6

_MEASURED_S = 0.15
_MEASURED_WIDTH = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCost:
    """Numbers of weights. Norms and biases, below a thousandth, are left out."""

    weights: int
    weights_a_token: int  # that one token meets: attention, its own experts; neither embedding nor output
    output_weights: int  # met by each token whose successor is chosen
    attention_values_a_token: int  # query and value columns in all layers: 2 FLOP each for every token attended to

    def flops(self, *, tokens: float, chosen: float, context: float) -> float:
        """Of `tokens` tokens that attend to `context` others on average, `chosen` of which yield a next token."""
        attention = 2 * self.attention_values_a_token * context
        return tokens * (2.0 * self.weights_a_token + attention) + 2.0 * chosen * self.output_weights


def model_cost(config: DecoderConfig) -> ModelCost:
    width, vocab = config.hidden_width, config.vocab_size
    layers = [_layer_weights(layer, width) for layer in config.layers]
    specs = [layer.attention.spec for layer in config.layers]
    output = vocab * width
    return ModelCost(
        weights=sum(held for held, _ in layers)
        + output * (1 if config.tied_embeddings or not config.has_output else 2),
        weights_a_token=sum(met for _, met in layers),
        output_weights=output,
        attention_values_a_token=sum(spec.num_heads * (spec.head_width + spec.value_width) for spec in specs),
    )


def _layer_weights(layer: LayerConfig, width: int) -> tuple[int, int]:
    """(held, met by one token)."""
    attention, forward = _attention_weights(layer.attention, width), layer.feed_forward
    if not isinstance(forward, ExpertsConfig):
        return (attention + _feed_forward_weights(forward, width),) * 2
    one, always = _feed_forward_weights(forward.expert, width), attention + width * forward.router.num_experts
    if forward.shared is not None:
        always += _feed_forward_weights(forward.shared, width)
    return always + forward.router.num_experts * one, always + forward.router.top_k * one


def _attention_weights(config: AttentionConfig | LatentAttentionConfig, width: int) -> int:
    spec = config.spec
    if isinstance(config, AttentionConfig):
        return width * (spec.num_heads + spec.num_kv_heads) * (spec.head_width + spec.value_width)
    query = spec.num_heads * (config.plain_width + config.rotary.width)
    queries = width * query if config.query_rank is None else config.query_rank * (width + query)
    heads = spec.num_heads * spec.value_width * (config.plain_width + config.head_value_width)
    return queries + width * spec.head_width + heads + width * spec.num_heads * config.head_value_width


def _expert_weights(config: DecoderConfig) -> int:
    """Those of all experts in all layers; what is shared by all tokens is not among them."""
    experts = [layer.feed_forward for layer in config.layers if isinstance(layer.feed_forward, ExpertsConfig)]
    return sum(one.router.num_experts * _feed_forward_weights(one.expert, config.hidden_width) for one in experts)


def _feed_forward_weights(config: FeedForwardConfig, width: int) -> int:
    return (3 if config.gated else 2) * width * config.width


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """One shard on this machine. `flops_per_s` is None where nothing was measured: the job runs on a GPU."""

    architecture: str
    parts: str  # for people
    num_layers: int
    hidden_width: int
    router_width: int  # the experts of all layers that have a router
    max_context: int
    device: Literal["cpu", "cuda"]
    dtype: str
    threads: int
    cost: ModelCost
    weight_bytes: int
    kv_cache_bytes: int  # the budget; pages are only used as they are written
    least_cache_bytes: int  # what one sequence of the whole context takes, if the budget is left to the engine
    num_experts: int  # a layer that has any; 0 in a dense model
    expert_bytes: int  # of weight_bytes, those of all experts
    flops_per_s: float | None  # of a large float32 matrix product, just now
    arithmetic: str  # what does it, for people
    attention: str  # which layers have which pattern, for people

    @property
    def bytes_of_an_expert(self) -> int:
        """In all layers that have experts."""
        return self.expert_bytes // max(1, self.num_experts)

    def rank_weight_bytes(self, ranks: int) -> int:
        """Of the rank that holds most, with the experts of each layer spread over so many."""
        if ranks == 1:
            return self.weight_bytes
        most = -(-self.num_experts // ranks)
        return self.weight_bytes - self.expert_bytes + self.expert_bytes * most // self.num_experts

    def rank_bytes(self, ranks: int) -> int:
        """The least memory that such a rank can work in: its weights, and a cache."""
        return self.rank_weight_bytes(ranks) + self.least_cache_bytes


def expert_layers(model: Path) -> tuple[tuple[int, ...], int]:
    """The layers of a checkpoint that have experts, and how many each; ((), 0) of a dense model.

    UserError for what is no model, or one whose layers have different numbers of experts.
    """
    config = load_checkpoint(model).config
    found = _experts_by_layer(config)
    if len(set(found.values())) > 1:
        raise UserError(f"{model}: layers with {sorted(set(found.values()))} experts can't be spread over shards")
    return tuple(found), max(found.values(), default=0)


def model_widths(model: Path) -> tuple[int, int]:
    """Of a checkpoint's hidden states, and of what its routers say together. UserError for what is no model."""
    config = load_checkpoint(model).config
    return config.hidden_width, router_width(config)


def _experts_by_layer(config: DecoderConfig) -> dict[int, int]:
    return {
        i: layer.feed_forward.router.num_experts
        for i, layer in enumerate(config.layers)
        if isinstance(layer.feed_forward, ExpertsConfig)
    }


def forecast(settings: EngineSettings, *, measures: bool = True) -> Forecast:
    """Reads the headers of a checkpoint and multiplies matrices for a moment, unless told not to measure.

    UserError for what is no model.
    """
    checkpoint = load_checkpoint(Path(settings.model_path))
    config = (with_attention(checkpoint, settings.attention) if settings.attention else checkpoint).config
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = resolve_precision(settings.dtype, torch.device(device))
    cost = model_cost(config)
    weight_bytes = _weight_bytes(cost, config, precision.weights)
    return Forecast(
        architecture=config.architecture,
        parts="; ".join(words for words in describe(config).values() if words),
        num_layers=len(config.layers),
        hidden_width=config.hidden_width,
        router_width=router_width(config),
        max_context=min(settings.max_context or config.max_context, config.max_context),
        device="cuda" if device == "cuda" else "cpu",
        dtype=str(precision.weights).removeprefix("torch."),
        threads=settings.threads,
        cost=cost,
        weight_bytes=weight_bytes,
        kv_cache_bytes=settings.kv_cache_bytes or _auto_cache_bytes(settings, config, precision.cache.itemsize, device),
        least_cache_bytes=settings.kv_cache_bytes
        or _auto_cache_bytes(replace(settings, max_sequences=1), config, precision.cache.itemsize, device),
        num_experts=max(_experts_by_layer(config).values(), default=0),
        expert_bytes=weight_bytes * _expert_weights(config) // cost.weights,
        flops_per_s=_measured_flops_per_s(settings.threads) if device == "cpu" and measures else None,
        arithmetic=_arithmetic(device),
        attention=describe_attention(config),
    )


def _weight_bytes(cost: ModelCost, config: DecoderConfig, dtype: torch.dtype) -> int:
    """8-bit weights have a float32 scale a row, counted here as if each row were as wide as the model."""
    scales = 4 * cost.weights // config.hidden_width if dtype == torch.int8 else 0
    return cost.weights * dtype.itemsize + scales


def _auto_cache_bytes(settings: EngineSettings, config: DecoderConfig, value_bytes: int, device: str) -> int:
    """As the engine settles it; it looks at the memory that is free once the weights are loaded."""
    step_tokens = settings.step_tokens or STEP_TOKENS
    shape = CacheShape(
        block_tokens=BLOCK_TOKENS,
        step_tokens=step_tokens,
        max_context=min(settings.max_context or config.max_context, config.max_context),
        max_sequences=min(step_tokens, settings.max_sequences or MAX_SEQUENCES),
    )
    needs = [
        GroupNeed(
            block_bytes=BLOCK_TOKENS * group.spec.cached_width * value_bytes * len(group.layers),
            reads=group.spec.reads,
        )
        for group in layer_groups(config)
    ]
    return auto_budget_bytes(needs, shape, torch.device(device), settings.sharers)


def _arithmetic(device: str) -> str:
    if device == "cuda":
        return "torch's CUDA operators"
    reason = build.load().reason
    return "kernels in C" if reason is None else f"torch's operations ({reason})"


def _measured_flops_per_s(threads: int) -> float:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        square = torch.rand(_MEASURED_WIDTH, _MEASURED_WIDTH)
        torch.mm(square, square)
        began, times = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - began) < _MEASURED_S:
            torch.mm(square, square)
            times += 1
        return 2.0 * _MEASURED_WIDTH**3 * times / elapsed
    finally:
        torch.set_num_threads(before)
