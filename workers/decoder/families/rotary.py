"""How configurations say rotary positions: rope_parameters (transformers 5), or rope_theta and rope_scaling before."""

from __future__ import annotations

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
    return RotaryConfig(width=width, theta=base.number("rope_theta", theta), scaling=_read_scaling(document, written))


def _read_scaling(document: Document, written: Document) -> RopeScaling | None:
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
    if kind == "divisors":  # ours: what GGUF files carry as a tensor
        return RopeScaling(kind="divisors", divisors=tuple(written.values["divisors"]))
    raise UserError(f"{written.where}: rope_type {kind!r} is not supported (default, linear, llama3 are)")
