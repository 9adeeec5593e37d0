"""Directories that have a tokenizer.json, read as transformers reads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as LibraryBackend

from pipeline.errors import UserError, one_line
from pipeline.tokenizers.checkpoint import (
    digest_of,
    directory_facts,
    read_json,
    special_token_strings,
    token_text,
    tokenizer_settings,
)
from pipeline.tokenizers.library import LibraryTokenizer
from pipeline.tokenizers.streaming import UnknownDecoder


def load_hugging_face(folder: Path) -> LibraryTokenizer:
    """Load tokenizer.json and what tokenizer_config.json adds to it.

    Whether a beginning-of-text token is added is tokenizer.json's post-processor to say: transformers ignores
    tokenizer_config.json's `add_bos_token` beside it, and so do we.
    """
    file = folder / "tokenizer.json"
    try:
        content = file.read_bytes()
        backend = LibraryBackend.from_buffer(content)
    except OSError as error:
        raise UserError(f"{file}: can't be read: {error.strerror}") from None
    except Exception as error:  # the library raises bare Exception for whatever it can't parse
        raise UserError(f"{file}: corrupt or too new: {one_line(error)}") from None
    config = tokenizer_settings(folder)
    _add_tokens(backend, config, read_json(folder / "added_tokens.json"), file)
    digest = digest_of(content, {key: value for key, value in config.items() if key != "chat_template"})
    facts = directory_facts(folder, config, backend.token_to_id, digest=digest)
    try:
        return LibraryTokenizer(backend, facts)
    except UnknownDecoder as error:
        raise UserError(f"{file}: {error}") from None


def _add_tokens(
    backend: LibraryBackend, config: Mapping[str, Any], legacy_added: Mapping[str, Any], file: Path
) -> None:
    """Add the tokens that only the configuration names; what names a role or is listed as special becomes special."""
    named = list(special_token_strings(config).values())
    for key in ("extra_special_tokens", "additional_special_tokens"):
        extra = config.get(key) or []
        listed = extra.values() if isinstance(extra, dict) else extra
        named += [text for text in map(token_text, listed) if text is not None]
    try:
        listed_tokens = {
            int(token_id): AddedToken(**{key: value for key, value in token.items() if key != "__type"})
            for token_id, token in config.get("added_tokens_decoder", {}).items()
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{file.with_name('tokenizer_config.json')}: bad added_tokens_decoder: {error}") from None
    if "added_tokens_decoder" not in config:
        for text, token_id in legacy_added.items():
            special = text in named
            listed_tokens[int(token_id)] = AddedToken(text, special=special, normalized=not special)
    known = {repr(token) for token in backend.get_added_tokens_decoder().values()}
    for token_id in sorted(listed_tokens):
        if repr(listed_tokens[token_id]) not in known:
            backend.add_tokens([listed_tokens[token_id]])
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    backend.add_tokens([AddedToken(text, special=True) for text in dict.fromkeys(named) if text not in known])
