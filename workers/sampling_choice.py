"""What a job leaves open about sampling, as the model's generation_config.json settles it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from workers.engine.request import SamplingParams

_FILTERS = ("top_p", "top_k", "min_p", "repetition_penalty")


def resolve_sampling(asked: Mapping[str, Any], model_path: Path) -> SamplingParams:
    """SamplingParams' fields, None where a job leaves it to the model -> SamplingParams.

    The model's file counts as transformers takes it: its temperature and filters only where it says `do_sample`, its
    repetition penalty always. Where it says nothing decoding is greedy and without filters.
    UserError if the file is damaged or holds what SamplingParams refuse.
    """
    config = _generation_config(model_path)
    samples = bool(config.get("do_sample"))
    fields = dict(asked)
    if fields.get("temperature") is None:
        fields["temperature"] = config.get("temperature", 1.0) if samples else 0.0
    for name in _FILTERS:
        if fields.get(name) is None:
            fields[name] = config.get(name) if samples or name == "repetition_penalty" else None
    try:
        return SamplingParams(**fields)
    except ValueError as error:
        raise UserError(f"generate, with {model_path}'s generation_config.json: {error}") from None


def _generation_config(model_path: Path) -> dict[str, Any]:
    path = model_path / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: must be a JSON object")
    return config
