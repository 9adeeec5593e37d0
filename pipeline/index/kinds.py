"""Which kind of index `auto` is: the rule in one place, a function of the numbers of vectors, dimensions and bytes.

    up to 50,000 vectors     exact: Flat, and where the memory does not hold it, SQ8, then PQ of d/4 and of d/8 bytes
    up to 250,000            HNSW32, and where the memory does not hold it, HNSW32,SQ8 and then as below
    more                     IVF with 2 * sqrt(n) to 4 * sqrt(n) lists: Flat, then SQ8, then PQ of d/4 and of d/8 bytes

The first that fits is built, and where it misses the recall that the job asks, the next that fits and whose codes are
no coarser. It never depends on the machine, so that the same job has the same index everywhere. Reasons: below 50,000
vectors a scan takes milliseconds and is exact. HNSW answers single queries fastest, and is slow to build and large. SQ8
costs little recall at a quarter of the size; product quantization much, and comes last.

n: vectors; d: width of a vector; k: lists.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, Final

import faiss

from pipeline.errors import UserError

AUTO: Final = "auto"
SMALLER: Final = "leave index.kind to auto, or name one of fewer lists or codes"
FLAT: Final = "Flat"
DEFAULT_MEMORY_BYTES: Final = 8 << 30
FLAT_VECTORS: Final = 50_000
HNSW_VECTORS: Final = 250_000
TRAINING_PER_LIST: Final = 64
TRAINING_OF_CODES: Final = 1 << 14  # a product quantizer of 8 bits wants about 10,000 vectors

_HNSW_LINKS: Final = 32
_ANY_DIMENSION: Final = 64
_REFINED: Final = 8  # a kind that refines looks at so many times k candidates


def settled_kinds(kind: str, *, num_vectors: int, dimension: int, memory_bytes: int) -> tuple[str, ...]:
    """The kinds to be tried in turn: what `auto` is, or the factory string as it is; any spelling of flat is Flat.

    UserError where no kind of `auto` fits.

    >>> settled_kinds("auto", num_vectors=1_000_000, dimension=384, memory_bytes=8 << 30)[0]
    'IVF2048,Flat'
    >>> settled_kinds("auto", num_vectors=1_000_000, dimension=384, memory_bytes=1 << 30)[0]
    'IVF2048,SQ8'
    """
    asked = re.sub("^(IDMap2?,)+", "", kind.strip())  # vectors get their numbers from us
    if asked.lower() != AUTO:
        return (FLAT if asked.lower() == FLAT.lower() else asked,)
    kinds = _candidates(num_vectors, dimension)
    sizes = {kind: index_bytes(kind, num_vectors, dimension) for kind in kinds}
    fitting = tuple(kind for kind in kinds if sizes[kind] <= memory_bytes)
    if not fitting:
        raise UserError(
            f"index.memory_bytes {memory_bytes:,}: no kind of index holds {num_vectors:,} vectors of {dimension} in "
            f"it; give it at least {min(sizes.values()):,}, or name a smaller index.kind"
        )
    return fitting


def next_kind(kinds: Sequence[str], missed: Sequence[str]) -> str | None:
    """The first of `kinds` that is worth building when those in `missed` were not good enough; None if none is.

    >>> next_kind(["HNSW32", "HNSW32,SQ8", "IVF2048,Flat"], ["HNSW32"])
    'IVF2048,Flat'
    """
    for kind in kinds:
        if kind not in missed and all(_coarseness(kind) <= _coarseness(other) for other in missed):
            return kind
    return None


def refuse_unknown(kind: str) -> None:
    """UserError for what FAISS can't read whatever the width of vectors, so that it shows before there are any."""
    try:
        if kind.strip().lower() not in (AUTO, FLAT.lower()):
            make_index(kind.strip(), _ANY_DIMENSION)
    except UserError as error:
        if "could not parse" in str(error):
            raise UserError(f"index.kind {kind!r} is neither auto nor a FAISS factory string") from None


def least_training(kind: str, dimension: int) -> int:
    """The fewest vectors that FAISS trains this kind on; 0 where it is not trained."""
    return _least_training(make_index(kind, dimension))


def _least_training(index: Any) -> int:
    inner: Any = faiss.downcast_index(index)
    if inner.is_trained:
        return 0
    if isinstance(inner, faiss.IndexPreTransform | faiss.IndexIDMap):
        return _least_training(inner.index)
    if isinstance(inner, faiss.IndexRefine):
        return _least_training(inner.base_index)
    lists = inner.nlist if isinstance(inner, faiss.IndexIVF) else 0
    return max(lists, 1 << inner.pq.nbits if hasattr(inner, "pq") else 0)


def make_index(kind: str, dimension: int) -> Any:
    """An empty inner-product index. UserError where FAISS doesn't know the factory string or can't have it so wide."""
    try:
        index = faiss.index_factory(dimension, kind, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise UserError(
            f"index.kind {kind!r} is no FAISS factory string for {dimension} dimensions: {faiss_reason(error)}"
        ) from error
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:  # HNSW over product quantizers is made for L2, without a word
        raise UserError(
            f"index.kind {kind!r} does not compare by inner product in FAISS; take HNSW32,SQ8 or an IVF kind"
        )
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None and ivf.nlist < 1:
        raise UserError(f"index.kind {kind!r} is no FAISS factory string for {dimension} dimensions: it has no lists")
    if isinstance(index, faiss.IndexRefine):
        index.k_factor = max(index.k_factor, _REFINED)  # FAISS's own 1 would only sort what was found
    for layer in layers(index):
        match layer:
            case faiss.IndexNSG():
                raise UserError(
                    f"index.kind {kind!r} takes all its vectors at once in FAISS, and none later; take HNSW32 instead"
                )
            case faiss.IndexIVFAdditiveQuantizer() | faiss.IndexIVFAdditiveQuantizerFastScan():
                raise UserError(
                    f"index.kind {kind!r} can't leave vectors out of a search in FAISS, as filters and deletions want; "
                    "take PQ in an IVF"
                )
            case faiss.IndexPQ() | faiss.IndexIVFPQ():
                # Or else codes get an order by which Hamming distances tell something (Douze et al. 2016, arXiv
                # 1609.01882). That takes seconds for each byte of a code, and no search here compares by it.
                codes: Any = layer  # whose type stubs leave this out
                codes.do_polysemous_training = False
    return index


def layers(index: Any) -> Iterator[Any]:
    """An index and those inside of it, but for the centroids of an IVF and what only refines."""
    layer: Any = faiss.downcast_index(index)
    yield layer
    match layer:
        case faiss.IndexPreTransform() | faiss.IndexIDMap():
            yield from layers(layer.index)
        case faiss.IndexRefine():
            yield from layers(layer.base_index)


def index_bytes(kind: str, num_vectors: int, dimension: int) -> int:
    """About what an index of this kind takes in memory, and its files on the disk. UserError as `make_index`."""
    return bytes_of(make_index(kind, dimension), num_vectors)


def bytes_of(index: Any, num_vectors: int) -> int:
    """The same of an index that was made."""
    inner: Any = faiss.downcast_index(index)
    if isinstance(inner, faiss.IndexPreTransform):
        return bytes_of(inner.index, num_vectors)
    if isinstance(inner, faiss.IndexIDMap):
        return 8 * num_vectors + bytes_of(inner.index, num_vectors)
    if isinstance(inner, faiss.IndexRefine):
        return bytes_of(inner.base_index, num_vectors) + bytes_of(inner.refine_index, num_vectors)
    if isinstance(inner, faiss.IndexHNSW):
        graph: Any = inner.hnsw
        links = 2 * int(graph.nb_neighbors(1)) * 4 + 16  # on the lowest level twice as many, higher ones hardly count
        return bytes_of(inner.storage, num_vectors) + num_vectors * links
    if isinstance(inner, faiss.IndexIVF):
        return num_vectors * (inner.code_size + 8) + inner.nlist * inner.d * 4
    return num_vectors * (inner.code_size if isinstance(inner, faiss.IndexFlatCodes) else 4 * inner.d)


def faiss_reason(error: Exception) -> str:
    """FAISS's message without the C++ signature and the source line."""
    text = " ".join(str(error).split())
    _, separator, after = text.rpartition("Error: ")
    if separator and "failed: " in after:
        after = after.partition("failed: ")[2] or after
    elif not separator:
        after = text.rpartition(".cpp:")[2].partition(": ")[2] or text
    return after


def num_lists(num_vectors: int) -> int:
    """k: the power of two next below 4 * sqrt(n) with at least 64 vectors a list, to train on.

    >>> num_lists(1_000_000)
    2048
    """
    most = max(min(int(4 * num_vectors**0.5), num_vectors // TRAINING_PER_LIST), 1)
    return 1 << (most.bit_length() - 1)


def _candidates(num_vectors: int, dimension: int) -> list[str]:
    if num_vectors <= FLAT_VECTORS:
        return [FLAT, "SQ8", *(_quantized(dimension) if num_vectors >= TRAINING_OF_CODES else ())]
    lists = f"IVF{num_lists(num_vectors)}"
    kinds = [f"{lists},Flat", f"{lists},SQ8", *(f"{lists},{codes}" for codes in _quantized(dimension))]
    if num_vectors <= HNSW_VECTORS:
        kinds = [f"HNSW{_HNSW_LINKS}", f"HNSW{_HNSW_LINKS},SQ8", *kinds]
    return kinds


def _coarseness(kind: str) -> float:
    """How much of a vector the codes of one of `_candidates` lose: 0 for nothing."""
    codes = kind.rpartition(",")[2]
    if codes.startswith("PQ"):
        return 2 + 1 / int(codes.removeprefix("PQ"))
    return 1 if codes == "SQ8" else 0


def _quantized(dimension: int) -> list[str]:
    """Product quantizers of about d/4 and d/8 bytes a vector; FAISS wants the number of bytes to divide d."""
    sizes = [
        max(size for size in range(1, dimension // share + 1) if dimension % size == 0)
        for share in (4, 8)
        if dimension >= share
    ]
    return [f"PQ{size}" for size in dict.fromkeys(sizes)]
