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
    kept, a ramp between. `yarn` (Peng et al. 2023): those that turn more than `beta_fast` times within
    `original_context` kept, those that turn less than `beta_slow` times divided, a ramp over the columns between, whose
    ends are whole columns if `truncate`. `divisors`: each frequency divided by its own number (how GGUF files say it).
    `longrope` (Ding et al. 2024): by `divisors`, or by `short_divisors` in a decoder that is loaded for no more than
    `original_context` positions. transformers chooses by each sequence's length, and computes all keys anew where one
    grows beyond; keys that stay in a cache can't change, so a decoder keeps to one choice, as vLLM does.
    Cosine and sine are both multiplied by `attention_factor`.
    """

    kind: Literal["linear", "llama3", "yarn", "divisors", "longrope"]
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_context: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    divisors: tuple[float, ...] = ()
    short_divisors: tuple[float, ...] = ()
    attention_factor: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RotaryConfig:
    """Rotary positions over the first `width` columns of each head. Layers with equal ones share their tables."""

    width: int
    theta: float
    scaling: RopeScaling | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionConfig:
    """Query, key and value are projected, normed, clipped and rotated, in that order, as far as asked for.

    `query_key_norm` has weights of its own for query and key: over each head ("head": one weight [D] for all heads;
    Qwen3, Gemma 3), or over all heads at once ("projection": [H * D] and [K * D]; OLMoE). `clip_qkv` bounds the
    projections to both sides. With `sinks` each query head has a score of its own without a value (gpt-oss).
    """

    spec: AttentionSpec
    rotary: RotaryConfig | None
    qkv_bias: bool = False
    output_bias: bool = False
    query_key_norm: NormConfig | None = None
    norm_over: Literal["head", "projection"] = "head"
    clip_qkv: float | None = None
    sinks: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttentionConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), in the form that needs no keys a head.

    A token's cache is one latent of `spec.value_width` columns, from which all heads' keys and values come, and one key
    of `rotary.width` columns that they share. So `spec` says attention with 1 key-value head over both together, whose
    values are the latent itself. Each head's query has `plain_width` columns that aren't rotated and its values
    `head_value_width`. `query_rank`: queries come out of a latent, too, of this width. `interleaved`: the checkpoint
    has its rotated columns in pairs; they are reordered as they are loaded.
    """

    spec: AttentionSpec
    rotary: RotaryConfig
    plain_width: int
    head_value_width: int
    query_rank: int | None
    latent_norm: NormConfig
    interleaved: bool = True
    bias: bool = False

    def __post_init__(self) -> None:
        spec = self.spec
        assert spec.values_in_keys, spec
        assert spec.num_kv_heads == 1, spec
        assert spec.head_width == spec.value_width + self.rotary.width, spec


@dataclass(frozen=True, slots=True, kw_only=True)
class ClampedSwiGLU:
    """min(gate, limit) * sigmoid(alpha * min(gate, limit)) * (1 + up within -limit to limit): gpt-oss."""

    alpha: float
    limit: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedForwardConfig:
    """down(activation(gate(x)) * up(x)) when gated, else down(activation(up(x))). A text is one of ops' activations."""

    width: int
    activation: str | ClampedSwiGLU
    gated: bool = True
    bias: bool = False

    def __post_init__(self) -> None:
        assert self.gated or isinstance(self.activation, str), "a clamped SwiGLU has a gate"


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """How a token chooses `top_k` of `num_experts` experts and what each one's answer weighs.

    `scores`: softmax over all experts, then the top ones ("softmax_all": Qwen, OLMoE; renormalised: Mixtral); the top
    logits, then softmax over those ("softmax_chosen": gpt-oss); a sigmoid each ("sigmoid": DeepSeek-V3); one expert
    after the other, each weighing its softmax over those of the logits left that come near the largest ("sparsemixer":
    Liu et al. 2024, Phi-MoE; near: within 2 * `tolerance` of it, relative to the larger of the two). A correction
    bias is added for choosing, not for weighing. With groups, only experts of the `top_groups` best groups can be
    chosen; a group's score is its best expert's, or with a correction bias the sum of its two best.
    """

    num_experts: int
    top_k: int
    scores: Literal["softmax_all", "softmax_chosen", "sigmoid", "sparsemixer"] = "softmax_all"
    renormalise: bool = False
    scale: float = 1.0
    correction_bias: bool = False
    bias: bool = False
    groups: int = 1
    top_groups: int = 1
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"a token can't choose {self.top_k} of {self.num_experts} experts")
        if self.num_experts % self.groups or not 1 <= self.top_groups <= self.groups:
            raise ValueError(f"{self.num_experts} experts don't make {self.groups} groups, {self.top_groups} chosen")
        size = self.num_experts // self.groups
        if self.groups > 1 and (self.top_groups * size < self.top_k or (self.correction_bias and size < 2)):
            raise ValueError(
                f"{self.top_groups} of {self.groups} groups of {size} experts leave too few to choose {self.top_k} from"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsConfig:
    """`shared`: a network that every token goes through besides, on its own rank; `shared_gate`: times a sigmoid."""

    router: RouterConfig
    expert: FeedForwardConfig
    shared: FeedForwardConfig | None = None
    shared_gate: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerConfig:
    """What a layer adds to its input x, each addend times `residual_scale` (Granite), as `arrangement` says.

    `sequential`: attention(norm(x)), then feed_forward(norm(x)) of the sum. `sandwich`: the same with a second norm
    behind each part (Gemma 2). `parallel`: both parts of x, each with its own norm (GPT-NeoX). `parallel_shared`: with
    one norm for both (Phi-2).
    """

    attention: AttentionConfig | LatentAttentionConfig
    feed_forward: FeedForwardConfig | ExpertsConfig
    norm: NormConfig
    arrangement: Literal["sequential", "sandwich", "parallel", "parallel_shared"] = "sequential"
    residual_scale: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionTableConfig:
    """A vector a position, added to the embedding: row `offset` + position of `rows`.

    `learned` is the checkpoint's own table. `sinusoidal` is computed: sines, then cosines, of frequencies from 1 to
    1 / 10000 (tensor2tensor's form of Vaswani et al. 2017).
    """

    kind: Literal["learned", "sinusoidal"]
    rows: int
    offset: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """`architecture` is the model_type of a Hugging Face configuration; `max_context` counts positions.

    Embeddings are multiplied by `embedding_scale`, then positions added, then normed. Logits are multiplied by
    `logit_scale`; with `logit_softcap` c a logit l then becomes c * tanh(l / c) (Gemma 2). Without `has_output`
    there are no logits: the checkpoint holds the base model alone, which embeds.
    """

    architecture: str
    vocab_size: int
    hidden_width: int
    max_context: int
    layers: tuple[LayerConfig, ...]
    norm: NormConfig
    tied_embeddings: bool
    embedding_scale: float = 1.0
    embedding_norm: NormConfig | None = None
    positions: PositionTableConfig | None = None
    has_output: bool = True
    output_bias: bool = False
    logit_scale: float = 1.0
    logit_softcap: float | None = None
