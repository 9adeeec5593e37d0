"""A small driver over paged caches: sequences grow by the tokens they are given, their blocks lie in shuffled order."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter
from torch import Tensor

from workers.decoder.attention import AttentionMetadata
from workers.decoder.experts import RouterListener
from workers.decoder.model import Decoder


class PagedSequences:
    """Steps a decoder over many sequences at once; frees blocks that no later query reads."""

    def __init__(self, decoder: Decoder, *, num_blocks: int = 64, block_tokens: int = 16, seed: int = 0) -> None:
        self.decoder = decoder
        self.block_tokens = block_tokens
        self.listener: RouterListener | None = None
        self.pools = decoder.new_pools([num_blocks] * len(decoder.groups), block_tokens)
        self._free = [list(range(num_blocks)) for _ in decoder.groups]
        for free in self._free:
            random.Random(seed).shuffle(free)
        self._tables: dict[int, list[list[int]]] = {}
        self._lengths: dict[int, int] = {}

    def step(self, tokens: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
        """tokens: sequence -> its next ones -> sequence -> their hidden states [n, C]."""
        ids, positions, starts = [], [], [0]
        for sequence, new in tokens.items():
            length = self._lengths.get(sequence, 0)
            tables = self._tables.setdefault(sequence, [[] for _ in self.decoder.groups])
            for g, group in enumerate(self.decoder.groups):
                while len(tables[g]) * self.block_tokens < length + len(new):
                    tables[g].append(self._free[g].pop())
                in_use = set(group.spec.reads.entries(length, len(tables[g]), self.block_tokens))
                for gone, block in enumerate(tables[g]):
                    if block >= 0 and gone not in in_use:
                        self._free[g].append(block)
                        tables[g][gone] = -1
            ids.extend(new)
            positions.extend(range(length, length + len(new)))
            starts.append(starts[-1] + len(new))
            self._lengths[sequence] = length + len(new)
        metadata = [self._metadata(g, list(tokens), starts, positions) for g in range(len(self.decoder.groups))]
        hidden = self.decoder.forward(
            torch.tensor(ids).long(),
            torch.tensor(positions).long(),
            metadata,
            self.pools,
            router_listener=self.listener,
        )
        return {s: hidden[starts[i] : starts[i + 1]] for i, s in enumerate(tokens)}

    def logits(self, tokens: Sequence[int], *, chunk: int | None = None) -> Tensor:
        """The logits [n, V] of a new sequence, computed whole or in chunks."""
        sequence, chunk = len(self._tables), chunk or len(tokens)
        chunks = [self.step({sequence: tokens[i : i + chunk]})[sequence] for i in range(0, len(tokens), chunk)]
        return self.decoder.logits(torch.cat(chunks))

    def greedy(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        """Continue all prompts together."""
        first = len(self._tables)
        given: dict[int, list[int]] = {first + i: list(prompt) for i, prompt in enumerate(prompts)}
        texts: dict[int, list[int]] = {s: [] for s in given}
        for _ in range(num_tokens):
            for sequence, hidden in self.step(given).items():
                texts[sequence].append(int(self.decoder.logits(hidden[-1:]).argmax()))
            given = {s: text[-1:] for s, text in texts.items()}
        return list(texts.values())

    def _metadata(self, g: int, sequences: list[int], starts: list[int], positions: list[int]) -> AttentionMetadata:
        tables = [self._tables[s][g] for s in sequences]
        width = max(len(table) for table in tables)
        slots = []
        for i, table in enumerate(tables):
            for position in positions[starts[i] : starts[i + 1]]:
                block, offset = divmod(position, self.block_tokens)
                slots.append(table[block] * self.block_tokens + offset)
        return AttentionMetadata(
            query_start=torch.tensor(starts, dtype=torch.int32),
            context_lens=torch.tensor([self._lengths[s] for s in sequences], dtype=torch.int32),
            block_table=torch.tensor([table + [-1] * (width - len(table)) for table in tables], dtype=torch.int32),
            slots=torch.tensor(slots).long(),
        )


@pytest.fixture(scope="session")
def paged() -> Callable[..., PagedSequences]:
    """`paged(path or decoder, ...)` -> PagedSequences over a float32 decoder."""

    def make(model: Path | Decoder, **settings: Any) -> PagedSequences:
        decoder = model if isinstance(model, Decoder) else Decoder.load(model, dtype="float32")
        return PagedSequences(decoder, **settings)

    return make


@pytest.fixture(scope="session")
def reference() -> Callable[[Path], Any]:
    """`reference(path)` -> the checkpoint as transformers runs it, in float32, with its plain attention."""
    loaded: dict[Path, Any] = {}

    def load(path: Path) -> Any:
        from transformers import AutoModelForCausalLM

        if path not in loaded:
            loaded[path] = AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, attn_implementation="eager"
            ).eval()
        return loaded[path]

    return load


@pytest.fixture(scope="session")
def write_gguf() -> Callable[..., None]:
    """`write_gguf(path, arch, num_layers, keys, tensors)` -> tensors under the names that gguf's own map gives them.

    `keys` adds the metadata to a GGUFWriter. `kind_of(name in the file, tensor)` says how numbers are stored.
    """

    def write(
        path: Path,
        arch: MODEL_ARCH,
        num_layers: int,
        keys: Callable[[GGUFWriter], None],
        tensors: Mapping[str, Tensor],
        kind_of: Callable[[str, Tensor], GGMLQuantizationType] = lambda *_: GGMLQuantizationType.F32,
    ) -> None:
        writer = GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
        keys(writer)
        names = gguf.get_tensor_name_map(arch, num_layers)
        for name, tensor in tensors.items():
            published = names.get_name(name, try_suffixes=(".weight", ".bias"))
            assert published is not None, name
            data, kind = np.ascontiguousarray(tensor.numpy()), kind_of(published, tensor)
            if kind is GGMLQuantizationType.F32:
                writer.add_tensor(published, data)
            else:
                writer.add_tensor(published, gguf.quantize(data, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return write
