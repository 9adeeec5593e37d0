"""The rule behind `kind: auto`, what its kinds take in memory, and into how many shards they are cut."""

from __future__ import annotations

import itertools
from typing import Any

import faiss
import numpy as np
import pytest

from pipeline.errors import UserError
from pipeline.index.budget import SHARD_VECTORS, build_budget, refuse_untrainable
from pipeline.index.faiss_files import train
from pipeline.index.kinds import index_bytes, least_training, make_index, next_kind, refuse_unknown, settled_kinds
from pipeline.index.recall import num_queries
from tests.pipeline.index.indexed_job import Make, unit

GIB = 1 << 30


def kinds_of_auto(num_vectors: int, memory_bytes: int, dimension: int = 384) -> tuple[str, ...]:
    return settled_kinds("auto", num_vectors=num_vectors, dimension=dimension, memory_bytes=memory_bytes)


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
    assert kinds_of_auto(num_vectors, memory_bytes)[0] == kind
    assert index_bytes(kind, num_vectors, 384) <= memory_bytes


def refuse(kind: str, num_vectors: int, **options: Any) -> None:
    refuse_untrainable(build_budget(kind, num_vectors, 16, **options), num_vectors, 16)


@pytest.mark.parametrize(
    ("kind", "least"),
    [("IVF100,Flat", 100), ("PCA4,IVF8,PQ4", 256), ("PQ4x4", 16), ("PQ4,RFlat", 256), ("Flat", 0), ("HNSW32", 0)],
)
def test_too_few_vectors_to_train_a_kind_on_are_told_beforehand(kind: str, least: int) -> None:
    assert least_training(kind, 16) == least
    enough = next(count for count in itertools.count(1) if count - num_queries(count) >= least)
    refuse(kind, enough)
    if least:
        few = f"is trained on {least} vectors or more, and of {enough - 1} there are {least - 1} to train on; leave"
        with pytest.raises(UserError, match=few):
            refuse(kind, enough - 1)


def test_too_little_memory_to_train_a_kind_in_is_told_beforehand() -> None:
    refuse("IVF20000,PQ8x4", 100_000, memory_bytes=30 << 20)
    with pytest.raises(UserError, match=r"index\.memory_bytes .* allows [\d,]+ to train on; .*, or give it more"):
        refuse("IVF20000,PQ8x4", 100_000, memory_bytes=28 << 20)


def test_what_is_not_refused_faiss_trains(job: Make) -> None:
    assert job("one", unit(133, seed=1), kind="IVF100,Flat", recall=0.01).build().num_vectors == 133
    refuse("IVF100,Flat", 133)
    with pytest.raises(UserError, match="can't be trained on 99 vectors"):
        job("other", unit(132, seed=1), kind="IVF100,Flat", recall=0.01)


def test_a_factory_string_is_taken_as_it_is_and_any_spelling_of_flat_is_flat() -> None:
    asked_for = {"flat": "Flat", " FLAT ": "Flat", "IVF7,SQ6": "IVF7,SQ6", "IDMap,SQ8": "SQ8", "IDMap2,Flat": "Flat"}
    for asked, kind in asked_for.items():
        assert settled_kinds(asked, num_vectors=9, dimension=8, memory_bytes=1) == (kind,)


def test_after_a_miss_comes_the_next_kind_that_fits_and_is_no_coarser() -> None:
    kinds = kinds_of_auto(200_000, GIB)
    assert kinds == ("HNSW32", "HNSW32,SQ8", "IVF1024,Flat", "IVF1024,SQ8", "IVF1024,PQ96", "IVF1024,PQ48")
    assert next_kind(kinds, ["HNSW32"]) == "IVF1024,Flat"
    assert next_kind(kinds, ["HNSW32", "IVF1024,Flat"]) is None
    small = kinds_of_auto(200_000, 200_000_000)
    assert small[0] == "HNSW32,SQ8"
    assert next_kind(small, ["HNSW32,SQ8"]) == "IVF1024,SQ8"
    assert next_kind(small, ["HNSW32,SQ8", "IVF1024,SQ8"]) is None
    assert next_kind(["IVF4,PQ4x4"], ["IVF4,PQ4x4"]) is None


def test_too_little_memory_for_any_kind_is_one_line_that_says_how_much_would_do() -> None:
    with pytest.raises(UserError, match=r"index\.memory_bytes 1,000: .* at least 59,") as caught:
        kinds_of_auto(1_000_000, 1000)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["Flat", "SQ8", "HNSW32", "HNSW16,SQ8", "IVF16,Flat", "IVF16,SQ8", "IVF16,PQ8x4"])
def test_the_memory_that_is_foretold_is_what_faiss_writes(kind: str) -> None:
    vectors = np.random.default_rng(0).normal(size=(2000, 64)).astype(np.float32)
    index: Any = faiss.index_factory(64, kind, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)
    assert faiss.serialize_index(index).nbytes == pytest.approx(index_bytes(kind, 2000, 64), rel=0.2)


def test_product_quantizers_are_trained_for_no_search_that_is_never_done() -> None:
    vectors = np.random.default_rng(0).normal(size=(600, 8)).astype(np.float32)
    plain: Any = faiss.index_factory(8, "PQ1", faiss.METRIC_INNER_PRODUCT)
    assert plain.do_polysemous_training, "which takes seconds a byte of a code"
    ours = make_index("PQ1", 8)
    for index in (plain, ours):
        index.train(vectors)
        index.add(vectors)
    assert not (ours.sa_encode(vectors) == plain.sa_encode(vectors)).all(), "it numbers codes otherwise"
    np.testing.assert_array_equal(ours.search(vectors[:20], 5)[0], plain.search(vectors[:20], 5)[0])
    for kind in ("IVF4,PQ2", "OPQ2,PQ2", "PQ2,RFlat", "OPQ2_4,IVF4,PQ2,RFlat"):
        whole = make_index(kind, 8)
        inner: Any = faiss.downcast_index(whole)
        while not hasattr(inner, "do_polysemous_training"):
            inner = faiss.downcast_index(inner.base_index if isinstance(inner, faiss.IndexRefine) else inner.index)
        assert not inner.do_polysemous_training


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("NSG16", "takes all its vectors at once"),
        ("PCA8,NSG16,RFlat", "takes all its vectors at once"),
        ("IVF4,RQ4x4", "can't leave vectors out of a search"),
        ("PCA8,IVF4,LSQ2x4fs", "can't leave vectors out of a search"),
    ],
)
def test_a_kind_that_could_not_grow_or_not_be_filtered_is_refused_beforehand(kind: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        build_budget(kind, 1000, 16)


@pytest.mark.parametrize("kind", ["OPQ2_4,IVF4,PQ2", "OPQ2,PQ2", "PQ2,RFlat", "IVF4_HNSW8,PQ2x4fs,RFlat", "RQ2x4"])
def test_training_on_few_vectors_is_what_faiss_makes_of_them_without_a_word(kind: str, capfd: Any) -> None:
    vectors = unit(300, seed=1)
    ours, plain = make_index(kind, 8), make_index(kind, 8)
    train(ours, vectors, kind)
    assert capfd.readouterr().err == ""
    plain.train(vectors)
    assert "please provide at least" in capfd.readouterr().err
    assert (faiss.serialize_index(ours) == faiss.serialize_index(plain)).all()


def test_an_index_is_cut_where_it_is_large_and_where_the_memory_does_not_hold_a_shard() -> None:
    assert build_budget("IVF2048,Flat", SHARD_VECTORS, 384).shards == 1
    assert build_budget("IVF2048,Flat", SHARD_VECTORS + 1, 384).shards == 2
    assert build_budget("Flat", 10 * SHARD_VECTORS, 384).shards == 10
    small = build_budget("IVF2048,Flat", 1_000_000, 384, memory_bytes=GIB)
    assert small.shards > 2
    assert small.side_by_side == 1
    assert small.peak_bytes(1) <= GIB
    large = build_budget("IVF2048,Flat", 4 * SHARD_VECTORS, 384)
    assert large.shards == 4
    assert large.side_by_side == 3
    assert large.peak_bytes(2) < large.peak_bytes(3) == large.peak_bytes(99) <= 8 * GIB


def test_shards_that_the_memory_does_not_hold_are_refused_with_how_much_they_take() -> None:
    with pytest.raises(
        UserError, match=r"index\.memory_bytes 1,073,741,824: building HNSW32 over .* in 2 shards takes"
    ):
        build_budget("HNSW32", 2_000_000, 384, memory_bytes=GIB, shards=2)
    with pytest.raises(UserError, match="give it more"):
        build_budget("SQ8", 100_000, 64, memory_bytes=10_000)


def test_a_string_that_faiss_cannot_read_is_refused_before_there_are_vectors() -> None:
    for known in ("auto", "flat", "IVF4096,PQ48", "PQ7", "OPQ16_64,IVF32,PQ16,RFlat"):
        refuse_unknown(known)
    with pytest.raises(UserError, match=r"index\.kind 'IVF8,Nope' is neither auto nor a FAISS factory string"):
        refuse_unknown("IVF8,Nope")


@pytest.mark.parametrize("kind", ["Nonsense", "IVF4", "PQ7", "IVF0,Flat", "", "HNSW32,,Flat"])
def test_a_string_that_faiss_does_not_know_is_one_line(kind: str) -> None:
    with pytest.raises(UserError, match=r"^index\.kind .* is no FAISS factory string for 8 dimensions") as caught:
        build_budget(kind, 100, 8)
    assert "\n" not in str(caught.value)
    assert "cpp" not in str(caught.value)


@pytest.mark.parametrize("kind", ["HNSW16,PQ4", "PCA4,HNSW8,PQ2"])
def test_kinds_that_faiss_makes_for_another_metric_are_refused(kind: str) -> None:
    with pytest.raises(UserError, match="does not compare by inner product"):
        make_index(kind, 8)
