"""What a checkpoint's JSON files say about its tokens: their roles, what ends a text, the chat template."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

# The roles that every tokenizer knows; a model may name more (`image_token`).


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFacts:
    """What a checkpoint says about its tokens, beyond how text is cut into them."""

    bos_id: int | None
    eos_ids: frozenset[int]
    chat_template: str | None
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    digest: str


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in `path`, or an empty one when there is no such file. UserError when it is not JSON."""
    value = read_json_value(path)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, not an object")
    return value


def read_json_value(path: Path) -> Any:
    """Return what is in `path`, or None when there is no such file. UserError when it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read as JSON: {error}") from None


def directory_facts(
    folder: Path, tokenizer_config: Mapping[str, Any], id_of: Callable[[str], int | None], *, digest: str
) -> CheckpointFacts:
    """Gather the facts of a directory in Hugging Face layout. `id_of` gives the id of a token's string."""
    special_tokens = special_token_strings(tokenizer_config)
    configs = [read_json(folder / "config.json"), read_json(folder / "generation_config.json")]
    configs += [config["text_config"] for config in configs if isinstance(config.get("text_config"), dict)]
    eos_ids: set[int] = set()
    for config in configs:
        eos_ids.update(_token_ids(config.get("eos_token_id")))
    bos_id = id_of(special_tokens["bos_token"]) if "bos_token" in special_tokens else None
    if bos_id is None:
        bos_id = next((id_ for config in configs for id_ in _token_ids(config.get("bos_token_id"))), None)
    eos_id = id_of(special_tokens["eos_token"]) if "eos_token" in special_tokens else None
    return CheckpointFacts(
        bos_id=bos_id,
        eos_ids=frozenset(eos_ids if eos_id is None else {*eos_ids, eos_id}),
        chat_template=_chat_template(folder, tokenizer_config),
        special_tokens=special_tokens,
        digest=digest,
    )


def tokenizer_settings(folder: Path) -> dict[str, Any]:
    """Return tokenizer_config.json, with what only the older special_tokens_map.json says added to it."""
    config = read_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        config = {**config, **read_json(folder / "special_tokens_map.json")}
    return config


def special_token_strings(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Return role -> string for every `*_token` of a tokenizer_config.json."""
    found = {key: token_text(value) for key, value in tokenizer_config.items() if key.endswith("_token")}
    return {key: text for key, text in found.items() if text is not None}


def token_text(token: object) -> str | None:
    """Return the string of a token that is written as a string or as an object with `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def digest_of(*parts: bytes | object) -> str:
    """Return the hex SHA-256 of `parts`: bytes as they are, anything else as canonical JSON."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode("utf-8")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def _token_ids(value: object) -> list[int]:
    """Return the ids in a config's value: a number, a list of numbers, or nothing."""
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, int) and not isinstance(item, bool)]


def _chat_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """Return the default template. A file of its own goes before tokenizer_config.json's, as in transformers."""
    file = folder / "chat_template.jinja"
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: can't be read: {error}") from None
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):  # several, with names
        by_name = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = by_name.get("default")
    return template if isinstance(template, str) else None
