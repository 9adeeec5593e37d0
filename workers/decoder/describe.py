"""A decoder's parts in words, from its configuration alone: what `gristmill plan` and docs/models.md say of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from workers.decoder.config import (
    AttentionConfig,
    ClampedSwiGLU,
    DecoderConfig,
    ExpertsConfig,
    FeedForwardConfig,
    LatentAttentionConfig,
    LayerConfig,
    NormConfig,
    RotaryConfig,
    RouterConfig,
)

_ARRANGEMENTS = {
    "sequential": "",
    "sandwich": "before and behind each part",
    "parallel": "attention and feed-forward side by side",
    "parallel_shared": "attention and feed-forward side by side behind one",
}
_SCORES = {
    "softmax_all": "softmax over all, then top-k",
    "softmax_chosen": "top-k, then softmax",
    "sigmoid": "sigmoid, top-k",
    "sparsemixer": "SparseMixer",
}
_GATED = {"silu": "SwiGLU", "gelu": "GeGLU", "gelu_tanh": "GeGLU (tanh)", "relu": "ReGLU"}
_PLAIN = {"silu": "SiLU", "gelu": "GELU", "gelu_tanh": "GELU (tanh)", "relu": "ReLU"}


def describe(config: DecoderConfig) -> dict[str, str]:
    """Part -> words; "" for a part that is not there. Sizes are left out.

    What differs between layers is joined by "and" in the order of the layers.
    """
    return {
        "norm": _over_layers(config, lambda layer: _listed(_norm(layer.norm), _ARRANGEMENTS[layer.arrangement])),
        "positions": _over_layers(config, lambda layer: _positions(config, layer)),
        "attention": _over_layers(config, lambda layer: _attention(layer.attention)),
        "pattern": _over_layers(config, lambda layer: layer.attention.spec.pattern),
        "feed-forward": _over_layers(config, _dense),
        "experts": _over_layers(config, _experts),
        "around": _around(config),
    }


def _over_layers(config: DecoderConfig, part: Callable[[LayerConfig], str]) -> str:
    return " and ".join(word for word in dict.fromkeys(part(layer) for layer in config.layers) if word)


def _listed(*words: str) -> str:
    return ", ".join(word for word in words if word)


def _norm(config: NormConfig) -> str:
    if config.kind == "rms":
        return "RMSNorm with bias" if config.bias else "RMSNorm"
    return "LayerNorm" if config.bias else "LayerNorm without bias"


def _positions(config: DecoderConfig, layer: LayerConfig) -> str:
    attention, words = layer.attention, []
    if config.positions is not None:
        words.append(f"{config.positions.kind} table")
    if attention.rotary is not None:
        words.append(_rotary(attention.rotary, attention))
    if attention.spec.alibi_slopes is not None:
        words.append("ALiBi")
    return " + ".join(words) or "none"


def _rotary(config: RotaryConfig, attention: AttentionConfig | LatentAttentionConfig) -> str:
    partial = isinstance(attention, LatentAttentionConfig) or config.width < attention.spec.head_width
    name = "partial rotary" if partial else "rotary"
    return name if config.scaling is None else f"{name} ({config.scaling.kind})"


def _attention(config: AttentionConfig | LatentAttentionConfig) -> str:
    spec = config.spec
    if isinstance(config, LatentAttentionConfig):
        compressed = "latent queries" if config.query_rank is not None else ""
        return _listed("multi-head latent", compressed, "biases" if config.bias else "", _softcap(spec.softcap))
    kind = "grouped-query"
    if spec.num_kv_heads in (1, spec.num_heads):
        kind = "multi-head" if spec.num_kv_heads == spec.num_heads else "multi-query"
    norm = ""
    if config.query_key_norm is not None:
        norm = "q/k norm" if config.norm_over == "head" else "q/k norm over all heads"
    biases = {(True, True): "biases", (True, False): "qkv bias", (False, True): "output bias"}
    return _listed(
        kind,
        biases.get((config.qkv_bias, config.output_bias), ""),
        norm,
        "clipped qkv" if config.clip_qkv is not None else "",
        "sinks" if config.sinks else "",
        _softcap(spec.softcap),
    )


def _softcap(softcap: float | None) -> str:
    return "" if softcap is None else "soft-cap"


def _dense(layer: LayerConfig) -> str:
    return _feed_forward(layer.feed_forward) if isinstance(layer.feed_forward, FeedForwardConfig) else ""


def _feed_forward(config: FeedForwardConfig) -> str:
    if isinstance(config.activation, ClampedSwiGLU):
        name = "clamped SwiGLU"
    else:
        names = _GATED if config.gated else _PLAIN
        name = names.get(config.activation, f"gated {config.activation}" if config.gated else config.activation)
    return _listed(name, "biases" if config.bias else "")


def _experts(layer: LayerConfig) -> str:
    config = layer.feed_forward
    if not isinstance(config, ExpertsConfig):
        return ""
    shared = ""
    if config.shared is not None:
        shared = "a gated shared expert" if config.shared_gate else "shared experts"
    return f"{_listed(_feed_forward(config.expert), shared)}: {_router(config.router)}"


def _router(config: RouterConfig) -> str:
    return _listed(
        _SCORES[config.scores],
        "renormalised" if config.renormalise else "",
        "scaled" if config.scale != 1.0 else "",
        "correction bias" if config.correction_bias else "",
        "router bias" if config.bias else "",
        "limited to the best groups" if config.groups > 1 else "",
    )


def _around(config: DecoderConfig) -> str:
    parts: Iterable[tuple[bool, str]] = (
        (config.embedding_scale != 1.0, "scaled embedding"),
        (config.embedding_norm is not None, "normed embedding"),
        (any(layer.residual_scale != 1.0 for layer in config.layers), "scaled residuals"),
        (config.output_bias, "output bias"),
        (config.logit_scale != 1.0, "scaled logits"),
        (config.logit_softcap is not None, "logit soft-cap"),
        (config.tied_embeddings, "tied output"),
        (not config.has_output, "no output"),
    )
    return _listed(*(words for there, words in parts if there))
