"""What ends a request's text: resolved once a set of parameters, then looked up for every token."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.tokenizer import Tokenizer, load_tokenizer
from pipeline.tokenizers.checkpoint import directory_facts
from workers.engine.request import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """A text ends before any of `token_ids` and where any of `strings` begins."""

    token_ids: frozenset[int]
    strings: tuple[str, ...]


class Endings:
    """Endings of parameters, remembered: a job has one set of parameters for millions of rows."""

    def __init__(self, tokenizer: Tokenizer | None, eos_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._eos_ids = eos_ids
        self._known: dict[SamplingParams, Ending] = {}

    def of(self, params: SamplingParams) -> Ending:
        """ValueError for stop strings without a tokenizer to see them with."""
        ending = self._known.get(params)
        if ending is None:
            if len(self._known) >= 1024:  # a server's clients may each send another set
                self._known.clear()
            ending = self._known[params] = self._resolve(params)
        return ending

    def _resolve(self, params: SamplingParams) -> Ending:
        token_ids = set(params.stop_token_ids)
        if not params.ignore_eos:
            token_ids |= self._eos_ids
        strings = []
        for text in params.stop:
            if self._tokenizer is None:
                raise ValueError("stop strings need a tokenizer, and this engine has none; use stop_token_ids")
            control = self._control_token(self._tokenizer, text)
            if control is None:
                strings.append(text)
            else:
                token_ids.add(control)
        return Ending(token_ids=frozenset(token_ids), strings=tuple(strings))

    @staticmethod
    def _control_token(tokenizer: Tokenizer, text: str) -> int | None:
        """The control token that `text` names: decoding leaves it out, so it could never be seen in the text."""
        try:
            ids = tokenizer.encode(text, add_special_tokens=False, parse_special=True)
        except ValueError:  # not text, hence not the name of a token
            return None
        return ids[0] if len(ids) == 1 and tokenizer.decode(ids) == "" else None


def read_vocabulary(path: Path) -> tuple[Tokenizer | None, frozenset[int]]:
    """The checkpoint's tokenizer, if it has one, and the tokens that end a text."""
    if path.is_dir() and not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return None, directory_facts(path, {}, lambda token: None, digest="").eos_ids
    tokenizer = load_tokenizer(path)
    return tokenizer, tokenizer.eos_ids
