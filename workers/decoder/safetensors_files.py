"""Reads safetensors files through a memory map, a slice at a time.

The format: 8 bytes with the header's length, the header (JSON: name -> dtype, shape, byte range), the tensors' bytes.
The safetensors package maps files too, but keeps every page it touched resident while the file is open; here pages are
given back after each read, so that loading a model takes the memory of the model and not twice that.
"""

from __future__ import annotations

import itertools
import json
import math
import mmap
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import UserError
from workers.decoder.mxfp4 import BLOCK, widen
from workers.decoder.storage import Source, Storage

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SIZES = {
    **{"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2},
    **{"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1},
}
_BITE_BYTES = 4 * 1024 * 1024
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    file: _File
    dtype: str
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the file
    end: int


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    data: mmap.mmap


class SafetensorsFiles(Storage):
    """All tensors of a folder's model.safetensors, or of the shards that its index lists."""

    def __init__(self, folder: Path) -> None:
        self._entries: dict[str, _Entry] = {}
        index = folder / _INDEX
        if not index.is_file():
            self._entries.update(_read_header(folder / _SINGLE))
            return
        placed = _weight_map(index)
        for name in sorted(set(placed.values())):
            if not (folder / name).is_file():
                raise UserError(f"{folder / name}: no such file, but {_INDEX} lists it; fetch the checkpoint again")
            self._entries.update(_read_header(folder / name))
        for tensor, name in placed.items():
            if tensor not in self._entries:
                raise UserError(
                    f"{folder / name}: has no tensor {tensor}, but {_INDEX} says so; fetch the checkpoint again"
                )

    @property
    def names(self) -> Collection[str]:
        return self._entries.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """The number format that `name` is stored in."""
        entry = self._entries[name]
        if entry.dtype not in _DTYPES:
            raise UserError(
                f"{entry.file.path}: tensor {name} is stored as {entry.dtype}, which can't be read; "
                f"use a checkpoint in {', '.join(sorted(_DTYPES))}"
            )
        return _DTYPES[entry.dtype]

    def where(self, name: str) -> str:
        return str(self._entries[name].file.path)

    def read(self, source: Source, dtype: torch.dtype) -> Tensor:
        if source.scales is None:
            piece = self._piece(self._entries[source.name], self.dtype(source.name), source, dtype)
        else:
            blocks, scales = self._packed(source.name), self._packed(source.scales)
            if blocks.shape[-1] != BLOCK // 2 or scales.shape != blocks.shape[:-1]:
                raise UserError(
                    f"{blocks.file.path}: tensors {source.name} of shape {list(blocks.shape)} and {source.scales} of "
                    f"{list(scales.shape)} don't make MXFP4 numbers; fetch the checkpoint again"
                )
            packed = self._piece(blocks, torch.uint8, source, torch.uint8)
            piece = widen(packed, self._piece(scales, torch.uint8, source, torch.uint8), dtype)
        return piece if source.arrange is None else source.arrange(piece).contiguous()

    def _packed(self, name: str) -> _Entry:
        entry = self._entries[name]
        if entry.dtype != "U8":
            raise UserError(f"{entry.file.path}: tensor {name} should hold bytes of MXFP4 numbers, not {entry.dtype}")
        return entry

    def _piece(self, entry: _Entry, stored: torch.dtype, source: Source, dtype: torch.dtype) -> Tensor:
        count = math.prod(entry.shape)
        if count == 0:
            return torch.empty(entry.shape, dtype=dtype)
        view = torch.frombuffer(entry.file.data, dtype=stored, count=count, offset=entry.begin).view(entry.shape)
        if source.at is not None:
            view = view[source.at]
        if source.rows is not None:
            view = view[slice(*source.rows, source.step)]
        if view.is_contiguous():  # as one run of numbers, which can be cut anywhere
            return _copied(entry, view.flatten(), dtype).view(view.shape)
        return _copied(entry, view, dtype)


def _copied(entry: _Entry, view: Tensor, dtype: torch.dtype) -> Tensor:
    """A view of the map in memory of its own, in bites whose pages are given back before the next is read."""
    piece = torch.empty(view.shape, dtype=dtype)
    size = view.element_size()
    step = max(1, _BITE_BYTES // max(1, view[:1].numel() * size))
    for first in range(0, view.shape[0], step):
        bite = view[first : first + step]
        piece[first : first + step] = bite
        begin = int(bite.storage_offset())
        last = begin + sum(
            (length - 1) * stride for length, stride in zip(map(int, bite.shape), map(int, bite.stride()), strict=True)
        )
        _give_back(entry.file.data, entry.begin + begin * size, entry.begin + (last + 1) * size)
    return piece


def has_safetensors(folder: Path) -> bool:
    return (folder / _INDEX).is_file() or (folder / _SINGLE).is_file()


def _give_back(data: mmap.mmap, begin: int, end: int) -> None:
    """Drop the resident pages of a byte range. They were only read, so they can be read again."""
    if hasattr(mmap, "MADV_DONTNEED"):
        begin -= begin % mmap.PAGESIZE
        data.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def _weight_map(index: Path) -> Mapping[str, str]:
    try:
        placed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{index}: not an index of shards ({error}); fetch the checkpoint again") from None
    if not isinstance(placed, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in placed.values()
    ):
        raise UserError(f"{index}: weight_map must name files beside it; fetch the checkpoint again")
    return placed


def _read_header(path: Path) -> dict[str, _Entry]:
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read: {getattr(error, 'strerror', None) or error}") from None
    size = len(data)
    length = int.from_bytes(data[:8], "little")
    if size < 8 or length > size - 8:
        raise _broken(path, f"truncated or not safetensors: its header would be {length} bytes of the file's {size}")
    try:
        header = json.loads(data[8 : 8 + length])
        tensors = {name: value for name, value in header.items() if name != "__metadata__"}
    except (ValueError, AttributeError, RecursionError):
        raise _broken(path, "its header is not JSON that says what tensors there are") from None
    file_ = _File(path, data)
    entries = {name: _entry(file_, name, value, 8 + length) for name, value in tensors.items()}
    needed = max((entry.end for entry in entries.values()), default=8 + length)
    if needed > size:
        raise _broken(path, f"truncated: it holds {size} bytes and its header describes {needed}")
    _refuse_overlap(path, entries)
    return entries


def _refuse_overlap(path: Path, entries: Mapping[str, _Entry]) -> None:
    placed = sorted((entry.begin, entry.end, name) for name, entry in entries.items() if entry.begin < entry.end)
    for (_, end, one), (begin, _, other) in itertools.pairwise(placed):
        if begin < end:
            raise _broken(path, f"its header puts tensors {one!r} and {other!r} into the same bytes")


def _entry(file: _File, name: str, value: Any, start: int) -> _Entry:
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        whole = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        # A format unknown here can't be read, which is said of a tensor that is needed.
        whole = whole and end - begin == (math.prod(shape) * _SIZES[dtype] if dtype in _SIZES else max(0, end - begin))
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise _broken(file.path, f"its header describes tensor {name!r} wrongly")
    return _Entry(file=file, dtype=dtype, shape=shape, begin=start + begin, end=start + end)


def _broken(path: Path, why: str) -> UserError:
    return UserError(f"{path}: {why}; fetch the file again")
