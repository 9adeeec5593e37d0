"""SentencePiece tokens to text, one at a time, as `SentencePieceProcessor::Decode` does for a whole list."""

from __future__ import annotations

from collections.abc import Mapping

from sentencepiece.sentencepiece_model_pb2 import ModelProto

SPACE_SIGN = "\u2581"  # stands for a space in pieces
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_Piece = ModelProto.SentencePiece


class PieceTexts:
    """What each id stands for. `added` are tokens beside the model's own: id -> (text, whether it is special)."""

    def __init__(self, model: ModelProto, added: Mapping[int, tuple[str, bool]]) -> None:
        self.drops_prefix = model.normalizer_spec.add_dummy_prefix or model.normalizer_spec.remove_extra_whitespaces
        self.drops_every_leading = model.normalizer_spec.remove_extra_whitespaces
        self.byte_of: dict[int, int] = {}
        self.special: dict[int, str] = {}  # text that is only shown when special tokens are not skipped
        self.verbatim: dict[int, str] = {}
        self.pieces: dict[int, str] = {}
        for token_id, piece in enumerate(model.pieces):
            if piece.type == _Piece.BYTE:
                self.byte_of[token_id] = int(piece.piece[3:5], 16)
            elif piece.type == _Piece.CONTROL:
                self.special[token_id] = piece.piece
            elif piece.type == _Piece.UNKNOWN:
                self.special[token_id] = piece.piece
                self.verbatim[token_id] = model.trainer_spec.unk_surface
            else:
                self.pieces[token_id] = piece.piece
        for token_id, (text, special) in added.items():
            self.pieces.pop(token_id, None)
            (self.special if special else self.verbatim)[token_id] = text


class PieceDecoder:
    """A `pipeline.tokenizer.IncrementalDecoder` for SentencePiece tokens.

    The space that the encoder put before a text is dropped. Byte tokens are held until they make a character; a byte
    that can't be part of one becomes a replacement sign.
    """

    def __init__(self, texts: PieceTexts, *, skip_special_tokens: bool) -> None:
        self._texts = texts
        self._skip_special_tokens = skip_special_tokens
        self._at_start = True
        self._bytes = bytearray()

    def push(self, token_id: int) -> str:
        texts = self._texts
        byte = texts.byte_of.get(token_id)
        if byte is not None:
            self._bytes.append(byte)
            text = _take_characters(self._bytes, final=False)
            self._at_start = self._at_start and not text
            return text
        piece = texts.pieces.get(token_id)
        if piece is None:
            text = texts.verbatim.get(token_id, "")
            if not self._skip_special_tokens:
                text = texts.special.get(token_id, text)
            text = self._settled() + text
        else:
            text = self._settled()
            self._at_start = self._at_start and not text
            if self._at_start and texts.drops_prefix and piece.startswith(SPACE_SIGN):
                piece = piece[1:]
                self._at_start = texts.drops_every_leading
            text += piece.replace(SPACE_SIGN, " ")
        self._at_start = self._at_start and not text
        return text

    def flush(self) -> str:
        return self._settled()

    def _settled(self) -> str:
        return _take_characters(self._bytes, final=True) if self._bytes else ""


def _take_characters(run: bytearray, *, final: bool) -> str:
    """Remove the characters that `run` begins with and return them; unless `final`, leave one that may be unfinished.

    As in SentencePiece, a byte that no character begins with, or whose character is cut short, is one replacement sign.
    """
    text = ""
    while run:
        length = _character_length(run[0])
        if len(run) < length and not final:
            break
        try:
            text += run[:length].decode("utf-8")
            del run[:length]
        except UnicodeDecodeError:
            text += _REPLACEMENT
            del run[:1]
    return text


def _character_length(lead: int) -> int:
    """Return how many bytes a UTF-8 character takes that begins with `lead`; 1 where none does."""
    if 0xC2 <= lead <= 0xDF:
        return 2
    if 0xE0 <= lead <= 0xEF:
        return 3
    return 4 if 0xF0 <= lead <= 0xF4 else 1
