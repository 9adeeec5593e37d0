"""Directories that have a tokenizer.json, read as transformers reads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken, processors
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
from pipeline.tokenizers.library import LibraryTokenizer, ends_added
from pipeline.tokenizers.streaming import UnknownDecoder

# Of these, transformers before version 5 framed a text as tokenizer_config.json says, whatever tokenizer.json says.
_FRAMED_BY_CONFIGURATION: Final = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer")


def load_hugging_face(folder: Path) -> LibraryTokenizer:
    """Load tokenizer.json and what tokenizer_config.json adds to it.

    Whether a beginning-of-text token is added is tokenizer.json's post-processor to say: transformers ignores
    tokenizer_config.json's `add_bos_token` beside it, and so do we. Not so for embedders: E5-Mistral was published with
    an `add_eos_token` that its tokenizer.json knows nothing of, and pools that token.
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
    parts: list[Any] = [content, {key: value for key, value in config.items() if key != "chat_template"}]
    if (folder / "modules.json").is_file() and _frame_as_configured(backend, config):
        parts.append("framed as configured")  # other ids than tokenizer.json alone would give
    facts = directory_facts(folder, config, backend.token_to_id, digest=digest_of(*parts))
    try:
        return LibraryTokenizer(backend, facts)
    except UnknownDecoder as error:
        raise UserError(f"{file}: {error}") from None


def _frame_as_configured(backend: LibraryBackend, config: Mapping[str, Any]) -> bool:
    """Put the ends around a text that `add_bos_token` and `add_eos_token` ask for -> whether they were others."""
    if str(config.get("tokenizer_class")).removesuffix("Fast") not in _FRAMED_BY_CONFIGURATION:
        return False
    backend.no_truncation()
    backend.no_padding()
    found = ends_added(backend)
    if found is None:
        return False
    roles = special_token_strings(config)
    ends: list[list[int]] = []
    for name, ids in zip(("bos_token", "eos_token"), found, strict=True):
        token_id = backend.token_to_id(roles[name]) if name in roles else None
        asked = config.get(f"add_{name}")
        ends.append(ids if token_id is None or not isinstance(asked, bool) else [token_id] if asked else [])
    before, after = ends
    if (before, after) == found:
        return False
    names = {token_id: backend.id_to_token(token_id) for token_id in (*before, *after)}
    template = [*(names[token_id] for token_id in before), "$A", *(names[token_id] for token_id in after)]
    backend.post_processor = processors.TemplateProcessing(
        single=template, pair=[*template, "$B:1"], special_tokens=[(text, token_id) for token_id, text in names.items()]
    )
    return True


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
