"""Training SentencePiece vocabularies."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from pipeline.errors import RowError, UserError
from pipeline.tokenizers.text import is_text

KINDS = ("bpe", "unigram")
_MAX_LINE = 4000  # characters; SentencePiece passes over longer sentences in silence
_MAX_LINES = 5_000_000  # of a larger corpus this many are drawn, which bounds memory
_MAX_VOCABULARY = 10_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What a training took in: `num_skipped` of `num_texts` were no text (a lone surrogate, not a string)."""

    vocab_size: int
    num_texts: int
    num_skipped: int


def train_tokenizer(corpus: Iterable[str | RowError], out: Path, kind: str, vocab_size: int) -> Training:
    """Train on the lines of `corpus` and write tokenizer.model and tokenizer_config.json to the new folder `out`.

    Every text survives encoding and decoding: text is not normalised, white space is kept, and a character that the
    vocabulary lacks becomes bytes. `<unk>`, `<s>` and `</s>` are the first three tokens; `<s>` is put before a text.
    `transformers.AutoTokenizer` loads the folder too. What `corpus` raises comes through. UserError when the kind is
    unknown, the corpus has no text, `vocab_size` does not suit it, or `out` is taken.
    """
    if kind not in KINDS:
        raise UserError(f"--kind {kind}: must be one of {', '.join(KINDS)}")
    if not 0 < vocab_size <= _MAX_VOCABULARY:
        raise UserError(f"--vocab-size {vocab_size}: must be between 1 and {_MAX_VOCABULARY}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there already and not an empty folder; name another")
    lines = _Lines(corpus)
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=written,
            model_type=kind,
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4 * _MAX_LINE,
            input_sentence_size=_MAX_LINES,
            shuffle_input_sentence=True,
            minloglevel=2,
        )
    except RuntimeError as error:
        if lines.failure is not None:
            raise lines.failure from None
        raise _explained(str(error), vocab_size, lines) from None
    _write(out, written.getvalue(), kind)
    return Training(vocab_size=vocab_size, num_texts=lines.num_texts, num_skipped=lines.num_skipped)


class _Lines:
    """The lines of a corpus, long ones cut at white space. What the corpus raises is kept: the trainer hides it."""

    def __init__(self, corpus: Iterable[str | RowError]) -> None:
        self._corpus = corpus
        self.num_texts = 0
        self.num_skipped = 0
        self.num_lines = 0
        self.failure: Exception | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for text in self._corpus:
                self.num_texts += 1
                if not is_text(text):
                    self.num_skipped += 1
                    continue
                for line in text.splitlines():
                    for part in _cut(line):
                        self.num_lines += 1
                        yield part
        except Exception as failure:
            self.failure = failure
            raise


def _cut(line: str) -> Iterator[str]:
    """Yield `line` in parts that the trainer takes, none of them empty."""
    while len(line) > _MAX_LINE:
        at = line.rfind(" ", 1, _MAX_LINE)
        at = at if at > 0 else _MAX_LINE
        yield line[:at]
        line = line[at:]
    if line.strip():
        yield line


def _explained(message: str, vocab_size: int, lines: _Lines) -> UserError:
    """Return what the trainer's `message` means for the person who asked."""
    if "sentences_.empty()" in message:
        return UserError(f"the corpus has no text to learn from ({lines.num_texts} texts, {lines.num_skipped} skipped)")
    too_large = re.search(r"set it to a value <= (\d+)", message)
    if too_large is not None:
        return UserError(
            f"--vocab-size {vocab_size}: too large for this corpus, which gives at most {too_large[1]} tokens;"
            " ask for fewer or bring more text"
        )
    too_small = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    if too_small is not None:
        return UserError(
            f"--vocab-size {vocab_size}: too small: this corpus's characters, the 256 bytes and the control tokens"
            f" take {too_small[1]}"
        )
    return UserError(f"SentencePiece could not train: {' '.join(message.split())}")


def _write(out: Path, model: bytes, kind: str) -> None:
    config = {
        "tokenizer_class": "LlamaTokenizer" if kind == "bpe" else "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": False,
        "legacy": False,
        "clean_up_tokenization_spaces": False,
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "tokenizer.model").write_bytes(model)
        (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out}: can't be written: {error.strerror}") from None
