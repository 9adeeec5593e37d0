"""Tokenizers that run in Hugging Face's `tokenizers` library, wherever their vocabulary came from."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence

import tokenizers
from tokenizers import Tokenizer as LibraryBackend

from pipeline.errors import RowError
from pipeline.tokenizer import IncrementalDecoder, PromptText, Span
from pipeline.tokenizers.added_tokens import AddedToken, AddedTokens
from pipeline.tokenizers.ascii_words import ascii_words
from pipeline.tokenizers.checkpoint import CheckpointFacts
from pipeline.tokenizers.described import DescribedTokenizer
from pipeline.tokenizers.streaming import Settings, StepwiseDecoder, check_decoder, decoder_steps
from pipeline.tokenizers.text import NOT_TEXT, is_text


class LibraryTokenizer(DescribedTokenizer):
    """A `pipeline.tokenizer.Tokenizer` over the `tokenizers` library. It takes `backend` over: don't change it after.

    Two backends share one vocabulary: `_parsing` finds control tokens in text and `_plain` does not. `_plain` knows one
    token more, `_break`, a string that occurs nowhere. Where only some of the control strings may be parsed, each of
    those is swapped for a break, so that the text between is cut exactly as between control tokens.
    """

    def __init__(self, backend: LibraryBackend, facts: CheckpointFacts) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = False
        self._facts = facts
        self._parsing = backend
        self._plain = _plain_sibling(backend)
        self._break = f"\U0010fffd{secrets.token_hex(16)}\U0010fffd"
        self._plain.add_tokens([tokenizers.AddedToken(self._break, normalized=False)])
        self._break_id = self._plain.token_to_id(self._break)
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._added = AddedTokens(
            AddedToken(
                text=token.content,
                token_id=token_id,
                special=token.special,
                strips_left=token.lstrip,
                strips_right=token.rstrip,
                single_word=token.single_word,
            )
            for token_id, token in added.items()
        )
        decoder = backend.decoder
        self._decoder: Settings | None = json.loads(decoder.__getstate__()) if decoder is not None else None
        check_decoder(self._decoder)
        self._words = ascii_words(backend)
        self._plainly_matched = _are_plainly_matched(list(added.values()))
        self._ends = ends_added(backend)
        self.vocab_size: int = max([backend.get_vocab_size(), *(token_id + 1 for token_id in added)])

    def encode(
        self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False, literal: Sequence[Span] = ()
    ) -> list[int]:
        if not is_text(text):
            raise ValueError("not text: it holds a lone surrogate")
        if text.isascii():
            ids = self._encode_ascii(text, add_special_tokens, parse_special, literal)
            if ids is not None:
                return ids
        if parse_special and self._added.control_touches(text, literal):
            return self._encode_partly(text, literal, add_special_tokens)
        backend = self._parsing if parse_special else self._plain
        encoded: list[int] = backend.encode(text, add_special_tokens=add_special_tokens).ids
        return encoded

    def encode_batch(self, prompts: Sequence[PromptText]) -> list[list[int] | RowError]:
        results: list[list[int] | RowError] = [NOT_TEXT] * len(prompts)
        alike: dict[tuple[bool, bool], list[int]] = {}  # (parse, add special tokens) -> which prompts
        for index, prompt in enumerate(prompts):
            text: object = prompt.text
            parse = prompt.parse_special
            if not isinstance(text, str):
                continue
            if self._words is not None and text.isascii():
                ids = self._encode_ascii(text, prompt.add_special_tokens, parse, prompt.literal)
                if ids is not None:
                    results[index] = ids
                    continue
            if parse and prompt.literal and self._added.control_touches(text, prompt.literal):
                if is_text(text):
                    results[index] = self._encode_partly(text, prompt.literal, prompt.add_special_tokens)
            else:
                alike.setdefault((parse, prompt.add_special_tokens), []).append(index)
        for (parse, add_special_tokens), indices in alike.items():
            self._encode_alike(prompts, indices, results, parse, add_special_tokens)
        return results

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        text: str = self._parsing.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def incremental(self, *, skip_special_tokens: bool = True) -> IncrementalDecoder:
        token_of, skipped = self._parsing.id_to_token, self._special_ids if skip_special_tokens else frozenset()

        def text_of(token_id: int) -> str | None:
            return None if token_id in skipped else token_of(token_id)

        return StepwiseDecoder(text_of, decoder_steps(self._decoder))

    def _encode_alike(
        self,
        prompts: Sequence[PromptText],
        indices: list[int],
        results: list[list[int] | RowError],
        parse_special: bool,
        add_special_tokens: bool,
    ) -> None:
        """Encode the prompts at `indices` in one call and put their ids into `results`."""
        backend = self._parsing if parse_special else self._plain
        texts = [prompts[index].text for index in indices]
        try:
            encodings = backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        except BaseException as error:  # one bad item fails the whole call
            if not isinstance(error, TypeError) and not _is_panic(error):
                raise
            for index in indices:
                results[index] = self._encode_row(prompts[index])
        else:
            for index, encoding in zip(indices, encodings, strict=True):
                results[index] = encoding.ids

    def _encode_row(self, prompt: PromptText) -> list[int] | RowError:
        if not is_text(prompt.text):
            return NOT_TEXT
        backend = self._parsing if prompt.parse_special else self._plain
        try:
            ids: list[int] = backend.encode(prompt.text, add_special_tokens=prompt.add_special_tokens).ids
        except BaseException as error:
            if not _is_panic(error):
                raise
            return RowError("internal", f"the tokenizer failed on the prompt: {error}")
        return ids

    def _encode_ascii(
        self, text: str, add_special_tokens: bool, parse_special: bool, literal: Sequence[Span]
    ) -> list[int] | None:
        """Return the ids of ASCII text by looking words up, None where this vocabulary has no such short cut."""
        if self._words is None or (add_special_tokens and self._ends is None):
            return None
        if not self._plainly_matched and self._added.occur_in(text):
            return None
        matches = self._added.find(text, parse_special=parse_special, literal=literal)
        if not matches:
            ids = self._words.encode(text)
        else:
            ids, at = [], 0
            for match in matches:
                if match.start > at:
                    ids += self._words.encode(text[at : match.start])
                ids.append(match.token_id)
                at = match.end
            if at < len(text):
                ids += self._words.encode(text[at:])
        return [*self._ends[0], *ids, *self._ends[1]] if add_special_tokens and self._ends else ids

    def _encode_partly(self, text: str, literal: Sequence[Span], add_special_tokens: bool) -> list[int]:
        """Encode `text`, parsing the control tokens outside `literal` alone."""
        found = self._added.find(text, parse_special=True, literal=literal)
        matches = [match for match in found if match.special]
        pieces, at = [], 0
        for match in matches:
            pieces += [text[at : match.start], self._break]
            at = match.end
        joined = "".join([*pieces, text[at:]])
        control_ids = iter([match.token_id for match in matches])
        ids: list[int] = self._plain.encode(joined, add_special_tokens=add_special_tokens).ids
        return [next(control_ids) if token_id == self._break_id else token_id for token_id in ids]


def _plain_sibling(backend: LibraryBackend) -> LibraryBackend:
    """Return a tokenizer with the vocabulary of `backend` that takes the strings of control tokens for plain text."""
    sibling = LibraryBackend(backend.model)  # shares the vocabulary, which is most of the memory
    if backend.normalizer is not None:
        sibling.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        sibling.pre_tokenizer = backend.pre_tokenizer
    if backend.post_processor is not None:
        sibling.post_processor = backend.post_processor
    added = backend.get_added_tokens_decoder()
    sibling.add_tokens([added[token_id] for token_id in sorted(added)])  # at once: each call rebuilds its automaton
    if set(sibling.get_added_tokens_decoder()) != set(added):  # ids with gaps can't be given anew one by one
        sibling = LibraryBackend.from_str(backend.to_str())
    sibling.encode_special_tokens = True
    return sibling


def ends_added(backend: LibraryBackend) -> tuple[list[int], list[int]] | None:
    """Return the ids that are put before and after a text by default, None where that can't be told from an example."""
    bare = backend.encode("a", add_special_tokens=False).ids
    framed = backend.encode("a", add_special_tokens=True).ids
    starts = [at for at in range(len(framed) - len(bare) + 1) if framed[at : at + len(bare)] == bare]
    if not bare or len(starts) != 1:
        return None
    return framed[: starts[0]], framed[starts[0] + len(bare) :]


def _is_panic(error: BaseException) -> bool:
    """Whether the library's native code failed an assertion of its own. The exception's class can't be imported."""
    return type(error).__name__ == "PanicException"


def _are_plainly_matched(tokens: Sequence[tokenizers.AddedToken]) -> bool:
    """Whether the library matches these tokens in one pass over the text, leftmost and longest first, and no more.

    It matches the ones that are not normalized first. With the others it can only disagree about shared characters.
    """
    if any(token.lstrip or token.rstrip or token.single_word for token in tokens):
        return False
    first = {character for token in tokens if not token.normalized for character in token.content}
    return not any(token.normalized and first.intersection(token.content) for token in tokens)
