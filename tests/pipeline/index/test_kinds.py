"""The rule behind `kind: auto`, and that HNSW and IVF built twice are the same whatever the threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import pytest

from pipeline.commits import CommitLog
from pipeline.errors import UserError
from pipeline.index import kinds
from pipeline.index.build import build_index, index_is_current
from pipeline.index.kinds import choose_kind, index_bytes
from pipeline.index.manifest import Provenance
from pipeline.job_folder import JobFolder

Committed = Callable[..., tuple[JobFolder, CommitLog]]
GIB = 1 << 30


@pytest.mark.parametrize(
    ("num_vectors", "memory_bytes", "kind"),
    [
        (0, GIB, "Flat"),
        (50_000, GIB, "Flat"),
        (50_000, 40_000_000, "SQ8"),
        (50_000, 6_000_000, "PQ96"),
        (50_001, GIB, "HNSW32"),
        (250_000, GIB, "HNSW32"),
        (250_000, 200_000_000, "HNSW32,SQ8"),
        (250_001, GIB, "IVF1024,Flat"),
        (1_000_000, 8 * GIB, "IVF2048,Flat"),
        (1_000_000, GIB, "IVF2048,SQ8"),
        (1_000_000, 120_000_000, "IVF2048,PQ96"),
        (1_000_000, 65_000_000, "IVF2048,PQ48"),
    ],
)
def test_auto_is_exact_while_small_and_quantized_where_memory_demands_it(
    num_vectors: int, memory_bytes: int, kind: str
) -> None:
    assert choose_kind(num_vectors, 384, memory_bytes) == kind
    assert index_bytes(kind, num_vectors, 384) <= memory_bytes


def test_too_little_memory_for_any_kind_is_one_line_that_says_how_much_would_do() -> None:
    with pytest.raises(UserError, match=r"index\.memory_bytes 1,000: .* at least 59,") as caught:
        choose_kind(1_000_000, 384, 1000)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["Flat", "SQ8", "HNSW32", "HNSW16,SQ8", "IVF16,Flat", "IVF16,SQ8", "IVF16,PQ8x4"])
def test_the_memory_that_is_foretold_is_what_faiss_writes(kind: str) -> None:
    vectors = np.random.default_rng(0).normal(size=(4000, 64)).astype(np.float32)
    index: Any = faiss.index_factory(64, kind, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)
    assert faiss.serialize_index(index).nbytes == pytest.approx(index_bytes(kind, 4000, 64), rel=0.15)


@pytest.mark.parametrize("kind", ["HNSW8", "HNSW8,SQ8", "IVF4,SQ8"])
def test_built_with_any_number_of_threads_the_files_are_the_same(
    committed: Committed, provenance: Provenance, kind: str
) -> None:
    folder, log = committed(np.random.default_rng(0).normal(size=(400, 8)).astype(np.float32))
    made = []
    for threads in (1, 2, 2):
        build_index(folder, log.commits, job="mine", provenance=provenance, kind=kind, shards=2, threads=threads)
        made.append({path.name: path.read_bytes() for path in folder.index.iterdir()})
    assert made[0] == made[1] == made[2]


def test_auto_that_would_choose_another_kind_now_makes_the_index_out_of_date(
    committed: Committed, provenance: Provenance, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, log = committed(np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32))
    made: dict[str, Any] = {"job": "mine", "provenance": provenance, "kind": "auto", "shards": 1}
    assert build_index(folder, log.commits, **made).kind == "Flat"
    assert index_is_current(folder, log.commits, **made)
    assert not index_is_current(folder, log.commits, **made, memory_bytes=400)
    monkeypatch.setattr(kinds, "FLAT_VECTORS", 29)
    assert not index_is_current(folder, log.commits, **made)
    assert build_index(folder, log.commits, **made).kind == "HNSW32"
