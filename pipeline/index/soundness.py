"""A shard that FAISS could read, looked through before it is searched: what points outside is refused, not followed.

A hash tells damage. It tells nothing where whoever changed a file also wrote the new hash into index.json. FAISS checks
sizes and a graph's edges while it reads; what it leaves are numbers of vectors, which it hands out or follows as they
are, efforts that ask for any amount of memory, and layers that don't fit each other.

n: vectors of a shard; d: width of a vector.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import faiss
import numpy as np
import numpy.typing as npt

from pipeline.errors import JobError, one_line
from pipeline.index.effort import effort_name, most_effort
from pipeline.index.manifest import BUILT_AGAIN, Shard

Numbers = npt.NDArray[np.int64]

_LEAST_WIDTH: Final = 1024  # an efSearch up to this asks for no memory worth the name, however few the vectors
_FLOATS_AT_ONCE: Final = 1 << 22
_faiss: Final[Any] = faiss  # its type stubs leave BlockInvertedLists out
_LISTS_IN_MEMORY: Final = (faiss.ArrayInvertedLists, _faiss.BlockInvertedLists)  # of fast scans the second


def refuse_unsound_shard(index: Any, path: Path, shard: Shard, *, exact: bool, deleted: Numbers | None = None) -> None:
    """JobError where the index of one shard can't be searched safely. `exact`: it is to be a Flat one.

    `deleted` are the numbers that it may lack, ascending. Looks at every number that it keeps, at every value of a Flat
    one, and asks it one query. Memory: two bytes a vector.
    """
    if not shard.num_held and not index.is_trained:
        return  # there was nothing to train it on, and there is nothing to find in it
    problem = _shard_problem(index, shard, exact)
    if problem is None and shard.absent:
        problem = _lost_problem(index, shard, deleted)
    if problem is not None:
        raise JobError(f"{path} is not sound: {problem}; remove it and {BUILT_AGAIN}")


def kept_numbers(index: Any) -> Numbers | None:
    """The numbers that a layer of an index keeps of its vectors; None where a vector's place is its number."""
    if isinstance(index, faiss.IndexIDMap):
        ids: Numbers = faiss.vector_to_array(index.id_map)
        return ids
    if not isinstance(index, faiss.IndexIVF):
        return None
    lists: Any = index.invlists
    sizes = [(place, lists.list_size(place)) for place in range(lists.nlist)]
    found = [faiss.rev_swig_ptr(lists.get_ids(place), size) for place, size in sizes if size]
    return np.concatenate([np.empty(0, np.int64), *found])


def _shard_problem(index: Any, shard: Shard, exact: bool) -> str | None:
    try:
        problem = next(_layer_problems(index, shard.num_held, shard.first_vector, shard.num_vectors), None)
        if problem is None and exact:
            problem = _flat_problem(index)
        if problem is None and shard.effort is not None:
            most = most_effort(index, shard.num_held)
            if effort_name(index) is None or most is None or not 1 <= shard.effort <= most:
                problem = f"index.json wants it searched with an effort of {shard.effort}, which it has no use for"
        if problem is None and shard.num_held and not exact:
            index.search(np.full((1, index.d), index.d**-0.5, np.float32), 1)
    except (RuntimeError, MemoryError) as error:
        return f"FAISS can't search it ({one_line(error)})"
    return problem


def held_numbers(index: Any) -> Numbers | None:
    """The numbers of an index's vectors, in whatever order it keeps them; None where a vector's place is its number."""
    inner: Any = faiss.downcast_index(index)
    while isinstance(inner, faiss.IndexPreTransform):
        inner = faiss.downcast_index(inner.index)
    return kept_numbers(inner)


def _lost_problem(index: Any, shard: Shard, deleted: Numbers | None) -> str | None:
    """A number that the shard lacks, though its vector was not deleted."""
    numbers = held_numbers(index)
    lacks = np.ones(shard.num_vectors, np.bool_)
    lacks[(np.arange(shard.num_held) if numbers is None else numbers) - shard.first_vector] = False
    if deleted is not None:
        low, high = np.searchsorted(deleted, (shard.first_vector, shard.first_vector + shard.num_vectors))
        lacks[deleted[low:high] - shard.first_vector] = False
    return (
        f"it lacks vector {shard.first_vector + int(np.argmax(lacks))}, which was not deleted" if lacks.any() else None
    )


def _layer_problems(index: Any, count: int, first: int, span: int) -> Iterator[str]:
    """What is wrong with an index of `count` vectors, and with those inside of it.

    They are numbered from `first` to `first + span - 1`, where `span` is more than `count` with numbers left out.
    """
    layer: Any = faiss.downcast_index(index)
    name = type(layer).__name__
    if layer.ntotal != count:
        yield f"its {name} holds {layer.ntotal} vectors, not {count}"
    if not layer.is_trained:
        yield f"its {name} was not trained"
    if layer.metric_type != faiss.METRIC_INNER_PRODUCT:
        yield f"its {name} does not compare by inner product"
    if isinstance(layer, faiss.IndexIVF) and not isinstance(_lists(layer), _LISTS_IN_MEMORY):
        yield "its lists are in another file"
    numbers = kept_numbers(layer)
    if numbers is None:
        wraps = isinstance(layer, faiss.IndexPreTransform | faiss.IndexRefine)
        if (first or span != count) and not wraps:
            yield f"its {name} numbers vectors from 0, one after another, not as index.json says"
    elif not _are_within(numbers, count, first, span):
        yield f"its vectors are not numbered as index.json says, {first} to {first + span - 1}, each once"
    elif isinstance(layer, faiss.IndexIDMap) and (np.diff(numbers) <= 0).any():
        yield f"its {name} does not number its vectors in order"
    within = _same_width(layer)
    if any(inner.d != layer.d for inner in within):
        yield f"its {name} is {layer.d} wide, and what is in it {' and '.join(str(inner.d) for inner in within)}"
    match layer:
        case faiss.IndexIDMap():
            yield from _layer_problems(layer.index, count, 0, count)
        case faiss.IndexPreTransform():
            yield from _transform_problems(layer)
            yield from _layer_problems(layer.index, count, first, span)
        case faiss.IndexRefine():
            yield from _layer_problems(layer.base_index, count, first, span)
            yield from _layer_problems(layer.refine_index, count, first, span)
        case faiss.IndexIVF():
            if layer.quantizer.d != layer.d or layer.quantizer.ntotal != layer.nlist:
                yield f"it has {layer.nlist} lists and {layer.quantizer.ntotal} centroids of width {layer.quantizer.d}"
        case faiss.IndexHNSW():
            if not 1 <= layer.hnsw.efSearch <= max(count, _LEAST_WIDTH):
                yield f"its graph is to be searched with a width of {layer.hnsw.efSearch}"
            if layer.storage.d != layer.d or layer.storage.ntotal != count:
                yield f"its graph is over {layer.storage.ntotal} vectors of width {layer.storage.d}"


def _same_width(layer: Any) -> list[Any]:
    """The layers that take the vectors which this one takes."""
    match layer:
        case faiss.IndexIDMap():
            return [layer.index]
        case faiss.IndexRefine():
            return [layer.base_index, layer.refine_index]
        case _:
            return []


def _transform_problems(layer: Any) -> Iterator[str]:
    width = layer.d
    for place in range(layer.chain.size()):
        transform = layer.chain.at(place)
        if not transform.is_trained or transform.d_in != width:
            yield f"its transform {place} takes vectors of width {transform.d_in}, not {width}, or was not trained"
        width = transform.d_out
    if layer.index.d != width:
        yield f"its transforms give vectors of width {width}, and the index inside has {layer.index.d}"


def _flat_problem(index: Any) -> str | None:
    inner: Any = faiss.downcast_index(index)
    if isinstance(inner, faiss.IndexIDMap):
        inner = faiss.downcast_index(inner.index)
    if not isinstance(inner, faiss.IndexFlat):
        return f"it is a {type(inner).__name__}, and index.json says Flat"
    values = faiss.rev_swig_ptr(inner.get_xb(), inner.ntotal * inner.d)
    for start in range(0, len(values), _FLOATS_AT_ONCE):
        if not np.isfinite(values[start : start + _FLOATS_AT_ONCE]).all():
            return "it holds NaN or infinities"
    return None


def _are_within(numbers: Numbers, count: int, first: int, span: int) -> bool:
    """Whether they are `count` of `first` to `first + span - 1`, each once, in any order."""
    if len(numbers) != count:
        return False
    if count and (numbers.min() < first or numbers.max() >= first + span):
        return False
    seen = np.zeros(span, bool)
    seen[numbers - first] = True
    return int(np.count_nonzero(seen)) == count


def _lists(index: Any) -> Any:
    return faiss.downcast_InvertedLists(index.invlists)
