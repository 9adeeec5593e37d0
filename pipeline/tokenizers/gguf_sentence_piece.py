"""GGUF vocabularies of the kind `llama`: a SentencePiece model's pieces, scores and types, made into a model again."""

from __future__ import annotations

from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

from pipeline.errors import UserError
from pipeline.tokenizers.added_tokens import AddedToken
from pipeline.tokenizers.gguf_vocabulary import TokenType, Vocabulary
from pipeline.tokenizers.piece_decoder import SPACE_SIGN
from pipeline.tokenizers.sentence_piece import Framing, SentencePieceTokenizer

_KNOWN_TYPES = frozenset(int(kind) for kind in TokenType)
_PHI3_PLAIN = frozenset({"<unk>", "<s>", "<|endoftext|>"})


def sentence_piece_tokenizer(vocabulary: Vocabulary) -> SentencePieceTokenizer:
    """Return the tokenizer of a `llama` vocabulary. As in llama.cpp, text after a control token is prefixed as well."""
    before, after = vocabulary.ends_added(adds_bos=True)
    framing = Framing(
        before=() if before is None else (before,),
        after=() if after is None else (after,),
        prefix_after_control=True,
    )
    try:
        return SentencePieceTokenizer(
            sentence_piece_model(vocabulary), vocabulary.facts(), framing, _strippers(vocabulary)
        )
    except RuntimeError as error:
        raise UserError(f"{vocabulary.path}: its vocabulary makes no SentencePiece model: {error}") from None


def sentence_piece_model(vocabulary: Vocabulary) -> ModelProto:
    """Return the vocabulary as a SentencePiece model, which can be saved as a tokenizer.model."""
    scores = vocabulary.array("scores", float)
    if len(scores) != len(vocabulary.tokens):
        raise UserError(
            f"{vocabulary.path}: {len(vocabulary.tokens)} tokens but {len(scores)} scores; convert it again"
        )
    model = ModelProto()
    for text, score, kind in zip(vocabulary.tokens, scores, vocabulary.types, strict=True):
        if kind == TokenType.USER_DEFINED:  # the converter wrote spaces for their signs
            spelled = text.replace(" ", SPACE_SIGN)
            text = text if spelled in vocabulary.id_of else spelled
        kind = kind if kind in _KNOWN_TYPES else TokenType.NORMAL
        model.pieces.add(piece=text, score=score, type=TokenType.UNUSED if kind == TokenType.UNKNOWN else kind)
    named = vocabulary.token_id("unknown") or 0
    unknown = next((at for at, kind in enumerate(vocabulary.types) if kind == TokenType.UNKNOWN), named)
    model.pieces[unknown].type = TokenType.UNKNOWN  # SentencePiece wants exactly one
    num_bytes = sum(kind == TokenType.BYTE for kind in vocabulary.types)
    if num_bytes not in (0, 256):
        raise UserError(
            f"{vocabulary.path}: its vocabulary has {num_bytes} byte tokens instead of 256; convert it again"
        )
    model.trainer_spec.model_type = TrainerSpec.BPE
    model.trainer_spec.byte_fallback = num_bytes == 256
    model.trainer_spec.unk_id = unknown
    model.trainer_spec.unk_piece = model.pieces[unknown].piece
    model.trainer_spec.unk_surface = ""  # a control token here as any other
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = vocabulary.value("add_space_prefix", bool, True)
    model.normalizer_spec.remove_extra_whitespaces = vocabulary.value("remove_extra_whitespaces", bool, False)
    model.normalizer_spec.precompiled_charsmap = bytes(
        byte & 0xFF for byte in vocabulary.array("precompiled_charsmap", int)
    )
    return model


def _strippers(vocabulary: Vocabulary) -> list[AddedToken]:
    """Return the control tokens that white space after them belongs to: Phi-3's, which files have no key for."""
    if vocabulary.architecture != "phi3":
        return []
    return [
        AddedToken(text=text, token_id=token_id, special=True, strips_right=True)
        for token_id, (text, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind == TokenType.CONTROL and text not in _PHI3_PLAIN
    ]
