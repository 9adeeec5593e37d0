"""How a model's authors pool hidden states, as its sentence-transformers files say."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.errors import UserError

DEFAULT_POOLING = "mean"

_MODES = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_weightedmean_tokens": "weighted_mean",
}
_NAMES = {"mean": "mean", "lasttoken": "last", "weightedmean": "weighted_mean"}


def resolve_pooling(pooling: str, model_path: Path) -> str:
    """`auto` -> what the model's `*_Pooling/config.json` says, or else the mean; any other pooling stays.

    UserError if the file says something that is not supported, so that nobody gets another vector in silence.
    """
    if pooling != "auto":
        return pooling
    files = sorted(model_path.glob("*_Pooling/config.json")) if model_path.is_dir() else []
    if not files:
        return DEFAULT_POOLING
    try:
        config = json.loads(files[0].read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{files[0]}: can't be read: {error}") from None
    if isinstance(config.get("pooling_mode"), str):
        modes = [config["pooling_mode"]]
        chosen = [_NAMES[mode] for mode in modes if mode in _NAMES]
    else:
        modes = [key for key, on in config.items() if key.startswith("pooling_mode_") and on]
        chosen = [_MODES[mode] for mode in modes if mode in _MODES]
    if len(modes) == 1 and chosen:
        return chosen[0]
    raise UserError(
        f"{files[0]} asks for {', '.join(modes) or 'no pooling'}; set embed.pooling to mean, last or weighted_mean"
    )
