"""Writes a checkpoint's tensors as safetensors, in shards of a bounded size with an index where there are several."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


class SafetensorsWriter:
    """Takes tensors one by one; holds no more of them in memory than one shard."""

    def __init__(self, folder: Path, *, shard_bytes: int = 900_000_000) -> None:
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self._pending and self._pending_bytes + tensor.nbytes > self._shard_bytes:
            self._flush()
        self._pending[name] = tensor.clone()  # the format holds no two tensors in the same memory
        self._pending_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def close(self) -> None:
        """Write what is left, and give the shards their names, which say how many they are."""
        self._flush()
        count = len(self._shards)
        names = ["model.safetensors"]
        if count > 1:
            names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
            placed = {tensor: name for name, tensors in zip(names, self._shards, strict=True) for tensor in tensors}
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(placed.items()))}
            (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        for i, name in enumerate(names):
            self._part(i).chmod(0o644)  # the library makes it readable for its owner alone
            self._part(i).rename(self._folder / name)

    def _flush(self) -> None:
        save_file(self._pending, self._part(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _part(self, index: int) -> Path:
        return self._folder / f"part-{index}"
