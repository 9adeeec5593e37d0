"""Layers as GPT-2 has them: LayerNorm, as many key-value heads as query heads, a feed-forward that is not gated."""

from __future__ import annotations

from workers.decoder.attention import AttentionSpec
from workers.decoder.config import (
    AttentionConfig,
    DecoderConfig,
    FeedForwardConfig,
    LayerConfig,
    NormConfig,
)
from workers.decoder.families.document import Document


def layer_norm_decoder(
    document: Document, *, activation: str, eps: float, inner: int, bias: bool = True, tied: bool = True
) -> DecoderConfig:
    """Equal layers, to be changed by the family. `bias` of everything, norms included.

    Keys are those of most architectures (hidden_size, num_attention_heads ...); `tied` is the architecture's default.
    """
    hidden_width = document.integer("hidden_size")
    num_heads = document.integer("num_attention_heads")
    if hidden_width % num_heads:
        raise document.wrong("hidden_size", f"a multiple of {num_heads}, the number of heads")
    head_width = hidden_width // num_heads
    norm = NormConfig(kind="layer", eps=eps, bias=bias)
    spec = AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_width=head_width,
        value_width=head_width,
        scale=head_width**-0.5,
    )
    layer = LayerConfig(
        attention=AttentionConfig(spec=spec, rotary=None, qkv_bias=bias, output_bias=bias),
        feed_forward=FeedForwardConfig(width=inner, activation=activation, gated=False, bias=bias),
        norm=norm,
    )
    return DecoderConfig(
        architecture=document.text("model_type"),
        vocab_size=document.integer("vocab_size"),
        hidden_width=hidden_width,
        max_context=document.integer("max_position_embeddings"),
        layers=(layer,) * document.integer("num_hidden_layers"),
        norm=norm,
        tied_embeddings=document.flag("tie_word_embeddings", tied),
    )


def alibi_slopes(num_heads: int, largest: float = 8.0) -> tuple[float, ...]:
    """2^(-largest / n) to the powers 1 ... n of the next lower power of two n, then of the odd ones of 2n.

    Press et al. 2022, as released: alibi_slopes(6) is 2^-2, 2^-4, 2^-6, 2^-8, 2^-1, 2^-3.
    """
    lower = 1 << (num_heads.bit_length() - 1)
    first = [2.0 ** (-largest * (i + 1) / lower) for i in range(lower)]
    between = [2.0 ** (-largest * (2 * i + 1) / (2 * lower)) for i in range(num_heads - lower)]
    return tuple(first + between)
