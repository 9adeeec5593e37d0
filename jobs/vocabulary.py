"""`gristmill tokenizer train`: the text of an input -> a SentencePiece vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import RowError
from pipeline.row_text import RowText
from pipeline.source import Source
from pipeline.tokenizers.training import train


def train_vocabulary(corpus: str, out: Path, kind: str, vocab_size: int) -> str:
    """Trains on every row of an input as a job would read it -> what was done, in a line.

    UserError where the corpus can't be read or has more than one text column, and whatever `train` refuses.
    """
    source = Source.open(corpus)
    unreadable = 0

    def texts() -> Iterator[str]:
        nonlocal unreadable
        row_text = RowText(source.columns, text_column=source.text_column, section="corpus")
        for split in source.splits():
            for rows in source.read(split, row_text.columns):
                for text in row_text.texts(rows.batch, rows.errors):
                    if isinstance(text, RowError):
                        unreadable += text.code != "empty_prompt"
                    else:
                        yield text

    try:
        done = train(texts(), out, kind, vocab_size)
    finally:
        source.close()
    skipped = unreadable + done.num_skipped
    return f"wrote {out}: {kind} vocabulary of {done.vocab_size:,} tokens from {done.num_texts:,} texts" + (
        f"; {skipped:,} rows were no text" if skipped else ""
    )
