"""How configurations say rotary positions: rope_parameters (transformers 5), or rope_theta and rope_scaling before."""

from __future__ import annotations

import math

from pipeline.errors import UserError
from workers.decoder.config import RopeScaling, RotaryConfig
from workers.decoder.families.document import Document


def read_rotary(document: Document, head_width: int, *, theta: float = 10_000.0, part: float = 1.0) -> RotaryConfig:
    """`theta` is the architecture's default for a configuration that names none, `part` of a head's width likewise."""
    written = document.inner("rope_parameters" if "rope_parameters" in document else "rope_scaling")
    base = written if "rope_theta" in written else document
    factor = written if "partial_rotary_factor" in written else document
    width = int(head_width * factor.number("partial_rotary_factor", part))
    if width % 2 or not 2 <= width <= head_width:
        raise UserError(f"{document.where}: rotary positions need an even width of heads of {head_width}, not {width}")
    scaling = _read_scaling(document, written, width // 2)
    return RotaryConfig(width=width, theta=base.number("rope_theta", theta), scaling=scaling)


def _read_scaling(document: Document, written: Document, frequencies: int) -> RopeScaling | None:
    kind = written.text("rope_type", written.text("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=written.number("factor"))
    if kind == "llama3":
        return RopeScaling(
            kind="llama3",
            factor=written.number("factor"),
            low_freq_factor=written.number("low_freq_factor"),
            high_freq_factor=written.number("high_freq_factor"),
            original_context=written.integer(
                "original_max_position_embeddings", document.integer("max_position_embeddings")
            ),
        )
    if kind == "dynamic":
        # Frequencies would change with each sequence's length once that goes beyond max_position_embeddings, where no
        # sequence of ours goes: within it they are as they were.
        return None
    if kind == "yarn":
        return _read_yarn(document, written)
    if kind in ("longrope", "su"):
        return _read_longrope(document, written, frequencies)
    if kind == "divisors":  # ours: what GGUF files carry as a tensor
        return RopeScaling(kind="divisors", divisors=written.numbers("divisors", frequencies))
    raise UserError(
        f"{written.where}: rope_type {kind!r} is not supported (default, linear, llama3, yarn, dynamic, longrope are)"
    )


def _read_longrope(document: Document, written: Document, frequencies: int) -> RopeScaling:
    context = document.integer("max_position_embeddings")
    outside = document if "original_max_position_embeddings" in document else written
    original = outside.integer("original_max_position_embeddings", context)
    factor = written.number("factor", context / original)
    usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    if "long_mscale" in written:  # Phi-3.5-MoE
        usual = written.number("long_mscale")
        written.refuse({"short_mscale": usual})
    return RopeScaling(
        kind="longrope",
        divisors=written.numbers("long_factor", frequencies),
        short_divisors=written.numbers("short_factor", frequencies),
        original_context=original,
        attention_factor=written.number("attention_factor", usual),
    )


def _read_yarn(document: Document, written: Document) -> RopeScaling:
    factor = written.number("factor")
    magnitude = yarn_magnitude(factor)
    if written.number("mscale", 0.0) and written.number("mscale_all_dim", 0.0):
        magnitude = yarn_magnitude(factor, written.number("mscale"))
        magnitude /= yarn_magnitude(factor, written.number("mscale_all_dim"))
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_context=written.integer(
            "original_max_position_embeddings", document.integer("max_position_embeddings")
        ),
        beta_fast=written.number("beta_fast", 32.0),
        beta_slow=written.number("beta_slow", 1.0),
        truncate=written.flag("truncate", True),
        attention_factor=written.number("attention_factor", magnitude),
    )


def yarn_magnitude(factor: float, scale: float = 1.0) -> float:
    """By how much YaRN enlarges queries and keys (Peng et al. 2023, section 3.4); `scale` is DeepSeek's mscale."""
    return 1.0 if factor <= 1.0 else 0.1 * scale * math.log(factor) + 1.0
