"""How hard an approximate index is searched: how many lists of an IVF (nprobe), how wide a walk in HNSW (efSearch).

Kinds wrap each other (id maps, transforms, refinement); the effort belongs to the IVF or the graph inside, and FAISS
wants its parameters nested as the kinds are. FAISS's own files don't keep efforts in one way for all kinds, so that
index.json does, and each search is told.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import faiss

_faiss: Final[Any] = faiss  # its type stubs know no constructor of parameters that takes any


def effort_name(index: Any) -> Literal["nprobe", "efSearch"] | None:
    """What FAISS calls the effort of this kind; None where it has none."""
    inner = _innermost(index)
    if isinstance(inner, faiss.IndexIVF):
        return "nprobe"
    return "efSearch" if isinstance(inner, faiss.IndexHNSW) else None


def most_effort(index: Any, num_vectors: int) -> int | None:
    """More than this finds nothing more: all lists, or as many nodes as there are vectors. None as `effort_name`."""
    inner = _innermost(index)
    if isinstance(inner, faiss.IndexIVF):
        return int(inner.nlist)
    return max(num_vectors, 1) if isinstance(inner, faiss.IndexHNSW) else None


def is_graph(index: Any) -> bool:
    """Whether vectors become nodes of a graph, whose edges depend on the order in which they are added."""
    return isinstance(_innermost(index), faiss.IndexHNSW)


def search_parameters(index: Any, effort: int | None) -> Any:
    """For `index.search(..., params=)`. None where `effort` is."""
    if effort is None:
        return None
    inner: Any = faiss.downcast_index(index)
    match inner:
        case faiss.IndexIDMap():  # passes them on
            return search_parameters(inner.index, effort)
        case faiss.IndexPreTransform():
            return _faiss.SearchParametersPreTransform(index_params=search_parameters(inner.index, effort))
        case faiss.IndexRefine():
            base = search_parameters(inner.base_index, effort)
            return _faiss.IndexRefineSearchParameters(k_factor=inner.k_factor, base_index_params=base)
        case faiss.IndexIVF():
            return _faiss.SearchParametersIVF(nprobe=effort)
        case faiss.IndexHNSW():
            return _faiss.SearchParametersHNSW(efSearch=effort)
    raise AssertionError(f"{type(inner).__name__} has no effort")


def _innermost(index: Any) -> Any:
    inner: Any = faiss.downcast_index(index)
    while True:
        match inner:
            case faiss.IndexIDMap() | faiss.IndexPreTransform():
                inner = faiss.downcast_index(inner.index)
            case faiss.IndexRefine():
                inner = faiss.downcast_index(inner.base_index)
            case _:
                return inner
