"""Reads GGUF files through a memory map, a tensor or an expert at a time, and widens quantized numbers."""

from __future__ import annotations

import math
import mmap
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from pipeline.errors import UserError
from pipeline.gguf_metadata import GgufTensor, GgufValue, gguf_files, read_gguf_header
from workers.decoder.storage import Source, Storage

_BITE_BYTES = 8192  # of a row, of which gguf takes 16 at once


@dataclass(frozen=True, slots=True)
class _Entry:
    path: Path
    data: mmap.mmap
    place: GgufTensor
    kind: GGMLQuantizationType
    row_bytes: int  # of one run of the last dimension


class GgufFiles(Storage):
    """All tensors of a .gguf file and of its siblings, where the model was split.

    `metadata` is what the first file says under the keys that begin with one of `prefixes`.
    """

    def __init__(self, path: Path, *, prefixes: tuple[str, ...] = ()) -> None:
        self._entries: dict[str, _Entry] = {}
        self.metadata: dict[str, GgufValue] = {}
        for file in gguf_files(path):
            metadata, places = read_gguf_header(file, prefix=prefixes)
            self.metadata = {**metadata, **self.metadata}
            with file.open("rb") as opened:
                data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
            for name, place in places.items():
                self._entries[name] = _entry(file, data, name, place)

    @property
    def names(self) -> Collection[str]:
        return self._entries.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].place.shape

    def where(self, name: str) -> str:
        return str(self._entries[name].path)

    def read(self, source: Source, dtype: torch.dtype) -> Tensor:
        entry = self._entries[source.name]
        shape = entry.place.shape
        begin = entry.place.offset
        if source.at is not None:
            begin += source.at * math.prod(shape[1:-1]) * entry.row_bytes
            shape = shape[1:]
        assert (source.scales, source.step) == (None, 1), source  # as no GGUF file has it
        run = source.rows
        if run is not None and len(shape) == 1:  # of a vector's numbers, which are stored as one row
            piece = self.read(replace(source, rows=None, arrange=None), dtype)[slice(*run)]
            return piece.clone() if source.arrange is None else source.arrange(piece).contiguous()
        if run is not None:
            begin += run[0] * math.prod(shape[1:-1]) * entry.row_bytes
            shape = (run[1] - run[0], *shape[1:])
        num_rows = math.prod(shape[:-1])
        stored = np.frombuffer(entry.data, np.uint8, num_rows * entry.row_bytes, begin).reshape(num_rows, -1)
        wide = _widened(stored, entry, source.name)
        piece = torch.from_numpy(wide).view(shape).to(dtype)
        if hasattr(mmap, "MADV_DONTNEED"):
            first = begin - begin % mmap.PAGESIZE
            entry.data.madvise(mmap.MADV_DONTNEED, first, begin + num_rows * entry.row_bytes - first)
        return piece if source.arrange is None else source.arrange(piece).contiguous()


def _widened(stored: np.ndarray, entry: _Entry, name: str) -> np.ndarray:
    """stored [rows, bytes] -> the numbers, float32, in memory of their own."""
    if entry.kind is GGMLQuantizationType.F32:
        return stored.view(np.float32).copy()
    # gguf widens 16 rows at a time in Python; rows side by side make fewer, larger bites.
    joined = math.gcd(stored.shape[0], max(1, _BITE_BYTES // entry.row_bytes))
    try:
        with np.errstate(invalid="ignore", over="ignore"):  # a scale that is no number stays visible in the answers
            return dequantize(stored.reshape(-1, joined * entry.row_bytes), entry.kind)
    except NotImplementedError:
        raise UserError(
            f"{entry.path}: tensor {name} is stored as {entry.kind.name}, which can't be read; "
            "use a file in another quantization, for instance Q8_0 or Q4_K"
        ) from None


def _entry(path: Path, data: mmap.mmap, name: str, place: GgufTensor) -> _Entry:
    try:
        kind = GGMLQuantizationType(place.kind)
    except ValueError:
        raise UserError(f"{path}: tensor {name} is stored as ggml's number format {place.kind}, unknown here") from None
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    width = place.shape[-1] if place.shape else 1
    if not place.shape or width % block_size:
        raise UserError(f"{path}: corrupt GGUF header: tensor {name} of shape {list(place.shape)} can't be {kind.name}")
    row_bytes = width // block_size * block_bytes
    end = place.offset + math.prod(place.shape[:-1]) * row_bytes
    if end > len(data):
        raise UserError(
            f"{path}: truncated GGUF file: it holds {len(data)} bytes and tensor {name} would end at {end}; "
            "fetch the file again"
        )
    return _Entry(path, data, place, kind, row_bytes)
