"""Directories that have a tokenizer.model and no tokenizer.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from pipeline.errors import UserError
from pipeline.tokenizers.added_tokens import AddedToken
from pipeline.tokenizers.checkpoint import digest_of, directory_facts, read_json, tokenizer_settings
from pipeline.tokenizers.sentence_piece import Framing, SentencePieceTokenizer


def load_sentence_piece(folder: Path) -> SentencePieceTokenizer:
    """Load tokenizer.model, and from tokenizer_config.json the added tokens and what goes around a text.

    Text is cut as SentencePiece itself cuts it. tokenizer_config.json says whether a beginning-of-text token is added
    (`add_bos_token`) and, with `legacy`, that text after a control token gets a leading space.
    """
    file = folder / "tokenizer.model"
    model = ModelProto()
    try:
        content = file.read_bytes()
        model.ParseFromString(content)
    except OSError as error:
        raise UserError(f"{file}: can't be read: {error.strerror}") from None
    except DecodeError:
        raise UserError(f"{file}: not a SentencePiece model, or a corrupt one") from None
    if not model.pieces:
        raise UserError(f"{file}: not a SentencePiece model: it has no vocabulary")
    if model.denormalizer_spec.precompiled_charsmap:
        raise UserError(f"{file}: it rewrites decoded text, which can't be followed token by token")
    config = _with_roles(tokenizer_settings(folder), model)
    added = _added_tokens(config, read_json(folder / "added_tokens.json"), folder)
    id_of = {piece.piece: token_id for token_id, piece in enumerate(model.pieces)}
    id_of |= {token.text: token.token_id for token in added}
    prefix = config.get("add_prefix_space")
    if isinstance(prefix, bool):
        model.normalizer_spec.add_dummy_prefix = prefix
    digest = digest_of(content, {key: value for key, value in config.items() if key != "chat_template"})
    facts = directory_facts(folder, config, id_of.get, digest=digest)
    eos_id = id_of.get(facts.special_tokens.get("eos_token", ""))
    framing = Framing(
        before=(facts.bos_id,) if config.get("add_bos_token") and facts.bos_id is not None else (),
        after=(eos_id,) if config.get("add_eos_token") and eos_id is not None else (),
        prefix_after_control=bool(config.get("legacy")),
    )
    try:
        return SentencePieceTokenizer(model, facts, framing, added)
    except RuntimeError as error:
        raise UserError(f"{file}: corrupt: {error}") from None


def _with_roles(config: Mapping[str, Any], model: ModelProto) -> dict[str, Any]:
    """Return `config` with the roles that only the model itself gives its tokens."""
    trainer = model.trainer_spec
    roles = {
        "bos_token": (trainer.bos_id, trainer.bos_piece),
        "eos_token": (trainer.eos_id, trainer.eos_piece),
        "unk_token": (trainer.unk_id, trainer.unk_piece),
        "pad_token": (trainer.pad_id, trainer.pad_piece),
    }
    own = {
        role: text
        for role, (token_id, text) in roles.items()
        if 0 <= token_id < len(model.pieces) and model.pieces[token_id].piece == text
    }
    return own | dict(config)


def _added_tokens(config: Mapping[str, Any], legacy: Mapping[str, Any], folder: Path) -> list[AddedToken]:
    listed = config.get("added_tokens_decoder")
    if listed is None:
        listed = {token_id: {"content": text} for text, token_id in legacy.items()}
    try:
        return [
            AddedToken(
                text=token["content"],
                token_id=int(token_id),
                special=bool(token.get("special")),
                strips_left=bool(token.get("lstrip")),
                strips_right=bool(token.get("rstrip")),
                single_word=bool(token.get("single_word")),
            )
            for token_id, token in listed.items()
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: bad added tokens: {type(error).__name__}: {error}") from None
