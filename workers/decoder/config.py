"""A decoder described by data: which parts each layer has. families/ makes it from a checkpoint's own configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from workers.decoder.attention import AttentionSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class NormConfig:
    """`rms`: over the root mean square (Zhang and Sennrich 2019); `layer`: less the mean, over the deviation."""

    kind: Literal["rms", "layer"] = "rms"
    eps: float
    bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length a model was first trained on.

    `linear`: all divided by `factor` (Chen et al. 2023). `llama3`: long wavelengths divided by `factor`, short ones
    kept, a ramp between. `divisors`: each frequency divided by its own number (how GGUF files say either).
    """

    kind: Literal["linear", "llama3", "divisors"]
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_context: int = 0
    divisors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RotaryConfig:
    """Rotary positions over the first `width` columns of each head. Layers with equal ones share their tables."""

    width: int
    theta: float
    scaling: RopeScaling | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionConfig:
    spec: AttentionSpec
    rotary: RotaryConfig | None
    qkv_bias: bool = False
    output_bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedForwardConfig:
    """down(activation(gate(x)) * up(x)) when gated, else down(activation(up(x))). `activation` is a key of ops'."""

    width: int
    activation: str
    gated: bool = True
    bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """How a token chooses `top_k` of `num_experts` experts and what each one's answer weighs.

    `scores`: softmax over all experts, then the top ones ("softmax_all": Qwen, OLMoE; renormalised: Mixtral); the top
    logits, then softmax over those ("softmax_chosen": gpt-oss); a sigmoid each ("sigmoid": DeepSeek-V3). A correction
    bias is added for choosing, not for weighing. With groups, only experts of the `top_groups` best groups can be
    chosen; a group's score is its best expert's, or with a correction bias the sum of its two best.
    """

    num_experts: int
    top_k: int
    scores: Literal["softmax_all", "softmax_chosen", "sigmoid"] = "softmax_all"
    renormalise: bool = False
    scale: float = 1.0
    correction_bias: bool = False
    bias: bool = False
    groups: int = 1
    top_groups: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"a token can't choose {self.top_k} of {self.num_experts} experts")
        if self.num_experts % self.groups or not 1 <= self.top_groups <= self.groups:
            raise ValueError(f"{self.num_experts} experts don't make {self.groups} groups, {self.top_groups} chosen")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsConfig:
    router: RouterConfig
    expert: FeedForwardConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerConfig:
    """A pre-norm layer: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    attention: AttentionConfig
    feed_forward: FeedForwardConfig | ExpertsConfig
    norm: NormConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """`architecture` is the model_type of a Hugging Face configuration; `max_context` counts positions."""

    architecture: str
    vocab_size: int
    hidden_width: int
    max_context: int
    layers: tuple[LayerConfig, ...]
    norm: NormConfig
    tied_embeddings: bool
