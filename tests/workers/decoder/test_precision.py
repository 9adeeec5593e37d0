"""Number formats: what `auto` means here, and how far bfloat16 weights lie from float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import UserError
from workers.decoder import precision
from workers.decoder.model import Decoder
from workers.decoder.precision import resolve_precision

CPU = torch.device("cpu")
PROMPT = torch.randint(3, 603, (40,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.mark.parametrize(
    ("features", "wanted"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
    ],
)
def test_auto_is_bfloat16_only_where_the_processor_multiplies_it(
    features: dict[str, bool], wanted: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert resolve_precision("auto", CPU).weights == wanted
    assert resolve_precision("auto", CPU).activations == torch.float32
    assert resolve_precision("float32", CPU).weights == torch.float32
    assert resolve_precision("bfloat16", CPU).cache == torch.bfloat16


def test_an_unknown_format_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="dtype: 'half' is not known; use one of auto, float32, bfloat16"):
        resolve_precision("half", CPU)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_bfloat16_halves_memory_and_stays_near_float32(
    model_type: str, native: bool, tiny_model: Callable[..., Path], paged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_model(model_type, tokenizer=False)
    wide = paged(path)
    if native:  # torch's own products
        monkeypatch.setattr("workers.decoder.ops.multiplies_bfloat16", lambda device: True)
    narrow = paged(Decoder.load(path, dtype="bfloat16"))
    assert narrow.decoder.block_bytes(0, 16) * 2 == wide.decoder.block_bytes(0, 16)
    assert narrow.decoder.head.weight.nbytes * 2 <= wide.decoder.head.weight.nbytes
    got, wanted = narrow.logits(PROMPT), wide.logits(PROMPT)
    assert got.dtype == torch.float32
    away = (got - wanted).norm() / wanted.norm()
    assert 1e-5 < away < 0.15  # not float32 in disguise, and not something else


def test_hardware_is_asked_by_the_names_torch_has() -> None:
    assert isinstance(precision.multiplies_bfloat16(CPU), bool)
    assert {"amx_bf16", "avx512_bf16"} <= set(torch.cpu.get_capabilities()) or torch.cpu.get_capabilities().get(
        "architecture"
    ) != "x86_64"
