"""Tokenizers that run in the `sentencepiece` library: tokenizer.model files, and GGUF vocabularies made into one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from pipeline.errors import RowError
from pipeline.tokenizer import IncrementalDecoder, PromptText, Span
from pipeline.tokenizers.added_tokens import AddedToken, AddedTokens, Match
from pipeline.tokenizers.checkpoint import CheckpointFacts
from pipeline.tokenizers.described import DescribedTokenizer
from pipeline.tokenizers.piece_decoder import PieceDecoder, PieceTexts
from pipeline.tokenizers.text import NOT_TEXT, is_text

_Piece = ModelProto.SentencePiece


@dataclass(frozen=True, slots=True, kw_only=True)
class Framing:
    """What goes around and between texts: `before` and `after` are added to a text by default.

    `prefix_after_control`: text that follows a control token gets the model's leading space too, as if it began there.
    """

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    prefix_after_control: bool = False


@dataclass(frozen=True, slots=True)
class _Text:
    """A PromptText."""

    text: str
    add_special_tokens: bool
    parse_special: bool
    literal: Sequence[Span]


class SentencePieceTokenizer(DescribedTokenizer):
    """A `pipeline.tokenizer.Tokenizer` over a SentencePiece model.

    SentencePiece itself never reads a control token from text. Where they are to be parsed, text is cut at them and
    the stretches between are encoded; a stretch that continues a text gets no leading space of its own, unless the
    framing says so.
    """

    def __init__(
        self, model: ModelProto, facts: CheckpointFacts, framing: Framing, added: Sequence[AddedToken] = ()
    ) -> None:
        """Take `model` over; what it has under an added token's id becomes that token. RuntimeError if it is bad."""
        for token in added:
            if token.token_id < len(model.pieces):
                model.pieces[token.token_id].piece = token.text
                model.pieces[token.token_id].type = _Piece.CONTROL if token.special else _Piece.USER_DEFINED
        self._facts = facts
        self._framing = framing
        self._texts = PieceTexts(model, {token.token_id: (token.text, token.special) for token in added})
        controls = [
            AddedToken(text=piece.piece, token_id=token_id, special=True)
            for token_id, piece in enumerate(model.pieces)
            if piece.type in (_Piece.CONTROL, _Piece.UNKNOWN)
        ]
        self._added = AddedTokens([*controls, *added])
        self._always_cut = any(not token.special for token in added)
        self.vocab_size = max([len(model.pieces), *(token.token_id + 1 for token in added)])
        self._beginning = SentencePieceProcessor.from_proto(model.SerializeToString())
        self._continuing = self._beginning
        if model.normalizer_spec.add_dummy_prefix and not framing.prefix_after_control:
            model.normalizer_spec.add_dummy_prefix = False
            self._continuing = SentencePieceProcessor.from_proto(model.SerializeToString())

    def encode(
        self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False, literal: Sequence[Span] = ()
    ) -> list[int]:
        if not is_text(text):
            raise ValueError("not text: it holds a lone surrogate")
        [ids] = self._encode_all([_Text(text, add_special_tokens, parse_special, literal)])
        return ids

    def encode_batch(self, prompts: Sequence[PromptText]) -> list[list[int] | RowError]:
        try:
            return [*self._encode_all(prompts)]
        except TypeError:  # one item that is no text fails the whole call
            return [self._encode_all([prompt])[0] if is_text(prompt.text) else NOT_TEXT for prompt in prompts]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        decoder = PieceDecoder(self._texts, skip_special_tokens=skip_special_tokens)
        return "".join(map(decoder.push, ids)) + decoder.flush()

    def incremental(self, *, skip_special_tokens: bool = True) -> IncrementalDecoder:
        return PieceDecoder(self._texts, skip_special_tokens=skip_special_tokens)

    def _encode_all(self, prompts: Sequence[PromptText]) -> list[list[int]]:
        """Encode every stretch of every prompt in one call, or two where stretches that continue a text differ."""
        beginnings: list[str] = []
        continuations: list[str] = []
        layouts = [self._layout(prompt, beginnings, continuations) for prompt in prompts]
        begun = iter(self._beginning.encode(beginnings))
        continued = iter(self._continuing.encode(continuations) if continuations else ())
        return [self._frame(prompt, layout, begun, continued) for prompt, layout in zip(prompts, layouts, strict=True)]

    def _layout(self, prompt: PromptText, beginnings: list[str], continuations: list[str]) -> list[Match] | None:
        """Append the stretches of `prompt` to the lists; return the tokens between, or None where it is one stretch."""
        text: object = prompt.text
        if not isinstance(text, str):  # SentencePiece takes bytes as well
            raise TypeError
        if not self._always_cut and not prompt.parse_special:
            beginnings.append(text)
            return None
        matches = self._added.find(text, parse_special=prompt.parse_special, literal=prompt.literal)
        at = 0
        for start, end in [*((match.start, match.end) for match in matches), (len(text), len(text))]:
            if start > at:
                (continuations if at else beginnings).append(text[at:start])
            at = end
        return matches

    def _frame(
        self,
        prompt: PromptText,
        matches: list[Match] | None,
        begun: Iterator[list[int]],
        continued: Iterator[list[int]],
    ) -> list[int]:
        """Put the ids of a prompt together from those of its stretches."""
        ids = list(self._framing.before) if prompt.add_special_tokens else []
        if matches is None:
            ids += next(begun)
        else:
            at = 0
            for match in matches:
                if match.start > at:
                    ids += next(continued if at else begun)
                ids.append(match.token_id)
                at = match.end
            if at < len(prompt.text):
                ids += next(continued if at else begun)
        return [*ids, *self._framing.after] if prompt.add_special_tokens else ids
