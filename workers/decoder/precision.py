"""Which number formats a decoder keeps and computes in."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from pipeline.errors import UserError

DTYPES = ("auto", "float32", "bfloat16", "int8")


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """Norms, routing weights, softmax and logits are float32 in any case."""

    weights: torch.dtype
    activations: torch.dtype
    cache: torch.dtype


def resolve_precision(dtype: str, device: torch.device) -> Precision:
    """`auto` is bfloat16 where the hardware multiplies it natively, else float32. `int8` narrows the weights alone.

    On processors activations stay float32 even beside bfloat16 weights: reading the weights is what costs there.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype: {dtype!r} is not known; use one of {', '.join(DTYPES)}")
    if dtype == "int8":
        return dataclasses.replace(resolve_precision("auto", device), weights=torch.int8)
    if dtype == "auto":
        dtype = "bfloat16" if multiplies_bfloat16(device) else "float32"
    if dtype == "float32":
        return Precision(weights=torch.float32, activations=torch.float32, cache=torch.float32)
    activations = torch.float32 if device.type == "cpu" else torch.bfloat16
    return Precision(weights=torch.bfloat16, activations=activations, cache=torch.bfloat16)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the hardware behind `device` has a matrix product in bfloat16 (AMX, AVX512-BF16, CUDA from 8.0 on)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))
