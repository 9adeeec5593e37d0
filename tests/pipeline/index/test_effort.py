"""The effort reaches the IVF or the graph inside, whatever is wrapped around it."""

from __future__ import annotations

from functools import cache
from typing import Any

import faiss
import numpy as np
import pytest

from pipeline.index.effort import effort_name, most_effort, search_parameters

VECTORS = np.random.default_rng(0).normal(size=(2000, 16)).astype(np.float32)


@cache
def trained(kind: str) -> Any:
    index: Any = faiss.index_factory(16, kind, faiss.METRIC_INNER_PRODUCT)
    index.train(VECTORS)
    return index


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("IVF32,Flat", "nprobe"),
        ("IVF32,SQ8", "nprobe"),
        ("IVF32_HNSW8,Flat", "nprobe"),
        ("PCA8,IVF32,Flat", "nprobe"),
        ("IVF32,PQ8x4,RFlat", "nprobe"),
        ("IVF32,PQ8x4fs", "nprobe"),
        ("HNSW8", "efSearch"),
        ("OPQ8,HNSW8,Flat", "efSearch"),
        ("HNSW8,SQ8", "efSearch"),
    ],
)
@pytest.mark.parametrize("numbered", [False, True])
def test_more_effort_finds_more(kind: str, name: str, numbered: bool) -> None:
    index = faiss.clone_index(trained(kind))
    if numbered:
        index = faiss.IndexIDMap2(index)
        index.add_with_ids(VECTORS, np.arange(len(VECTORS)))
    else:
        index.add(VECTORS)
    assert effort_name(index) == name
    most = most_effort(index, len(VECTORS))
    assert most is not None
    truth = np.argsort(-(VECTORS[:100] @ VECTORS.T), axis=1)[:, :10]

    def found(effort: int) -> int:
        numbers = index.search(VECTORS[:100], 10, params=search_parameters(index, effort))[1]
        return sum(len(set(a) & set(b)) for a, b in zip(numbers.tolist(), truth.tolist(), strict=True))

    assert found(1) < found(min(most, 256))


@pytest.mark.parametrize("kind", ["Flat", "SQ8", "PQ8x4", "PQ8x4fs"])
def test_kinds_that_look_at_all_vectors_have_no_effort_and_take_no_parameters(kind: str) -> None:
    index = faiss.clone_index(trained(kind))
    index.add(VECTORS)
    assert effort_name(index) is None
    assert most_effort(index, len(VECTORS)) is None
    index.search(VECTORS[:1], 3, params=search_parameters(index, None))
