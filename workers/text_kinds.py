"""The texts that a job's rows give, to be continued and to be embedded, and how long each may be.

Shards tokenize by it, and `gristmill plan` counts by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from pipeline.prompts import ModelText, PromptBuilder, PromptSettings, TextBuilder
from pipeline.row_text import RowText
from pipeline.sentence_transformers import read_embedder
from pipeline.source import Source
from pipeline.tokenizer import Tokenizer
from workers.settings import EmbedSettings

OnTooLong = Literal["error", "truncate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextKind:
    """One of the texts that a row gives: the prompt that is continued, or the passage that is embedded."""

    builder: PromptBuilder | TextBuilder
    max_tokens: int  # more than these are too many
    counted: str = ""  # what people should know about how its tokens were counted
    shortened_tokens: int | None = None  # a text of too many is cut down to these; None: it is refused


def prompt_kind(
    prompt: PromptSettings,
    source: Source,
    tokenizer: Tokenizer,
    *,
    now: datetime,
    max_context: int,
    max_new_tokens: int,
    on_too_long: OnTooLong,
) -> TextKind:
    """A prompt that fills the context leaves no room for a token; one that is cut leaves room for an answer."""
    builder = PromptBuilder(
        prompt, source.columns, model=ModelText.of(tokenizer), text_column=source.text_column, now=now
    )
    room = min(max_new_tokens, max_context // 2)
    return TextKind(
        builder=builder,
        max_tokens=max_context - 1,
        shortened_tokens=max_context - room if on_too_long == "truncate" else None,
    )


def passage_kind(
    embed: EmbedSettings,
    prompt: PromptSettings,
    source: Source,
    *,
    model_path: Path,
    max_context: int,
    on_too_long: OnTooLong,
) -> TextKind | None:
    """None where only generations are embedded. The length that the model's files allow is a limit too."""
    if embed.of == "generation":
        return None
    if embed.template is not None:
        row_text = RowText(source.columns, template=embed.template, section="embed")
    else:
        row_text = RowText(
            source.columns, column=prompt.column, template=prompt.template, text_column=source.text_column
        )
    own_limit = read_embedder(model_path, pooling_is_given=True).max_tokens
    most = min(max_context, own_limit or max_context)
    return TextKind(
        builder=TextBuilder(row_text),
        max_tokens=most,
        counted=" (embed.echo says the text twice)" if embed.text.echo else "",
        shortened_tokens=most if on_too_long == "truncate" else None,
    )
