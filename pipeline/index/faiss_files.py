"""FAISS's own files: filled with numbered vectors, written and flushed, read only after our hash has checked them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import faiss
import numpy as np
import numpy.typing as npt

from pipeline.durable import HashedFile, file_sha256, storage_errors
from pipeline.errors import JobError, UserError
from pipeline.index.kinds import SMALLER, faiss_reason, layers
from pipeline.index.manifest import BUILT_AGAIN, Contents, Shard

_faiss: Final[Any] = faiss  # its type stubs leave PyCallbackIOWriter out
_BLOCK_BYTES: Final = 1 << 20
_LIMIT_SLACK_BYTES: Final = 1 << 20


@contextmanager
def faiss_threads(threads: int | None) -> Iterator[None]:
    """FAISS uses `threads` threads in the block, or as many as before where it is None. It is the process's setting."""
    before = faiss.omp_get_max_threads()
    if threads is not None:
        faiss.omp_set_num_threads(threads)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def train(index: Any, sample: npt.NDArray[np.float32], kind: str) -> None:
    """UserError where there are too few vectors for this kind of index."""
    rotations = [(rotation, _faiss.ProductQuantizer(rotation.d_out, rotation.M, 8)) for rotation in _rotations(index)]
    for rotation, quantizer in rotations:
        rotation.pq = quantizer  # as FAISS makes it itself, and nobody else could tell it anything
    for clustering in (*_clusterings(index), *(quantizer.cp for _, quantizer in rotations)):
        clustering.min_points_per_centroid = 1  # fewer than FAISS likes are still trained on, and it says nothing of it
    try:
        index.train(sample)
    except RuntimeError as error:
        raise UserError(
            f"index.kind {kind!r} can't be trained on {len(sample)} vectors: {faiss_reason(error)}; {SMALLER}"
        ) from error
    finally:
        for rotation, _ in rotations:
            rotation.pq = None


def _rotations(index: Any) -> Iterator[Any]:
    """Its OPQ transforms, each of which trains a product quantizer of its own, again and again."""
    for layer in layers(index):
        if isinstance(layer, faiss.IndexPreTransform):
            chain: Any = layer.chain
            for place in range(chain.size()):
                transform = faiss.downcast_VectorTransform(chain.at(place))
                if isinstance(transform, faiss.OPQMatrix):
                    yield transform


def _clusterings(index: Any) -> Iterator[Any]:
    """The settings of the other k-means that training it runs."""
    for layer in layers(index):
        owner: Any
        for owner in (layer, getattr(layer, "pq", None), getattr(layer, "rq", None)):
            if hasattr(owner, "cp"):
                yield owner.cp


def with_numbers(index: Any, first_vector: int, *, gaps: bool = False) -> Any:
    """`index` made to give vectors that are added numbers from `first_vector` on; with `gaps` not one after another."""
    inner: Any = faiss.downcast_index(index)
    while isinstance(inner, faiss.IndexPreTransform):
        inner = faiss.downcast_index(inner.index)
    if (first_vector == 0 and not gaps) or isinstance(inner, faiss.IndexIVF):
        return index
    return faiss.IndexIDMap2(index)


def reserve(index: Any, num_vectors: int) -> None:
    """Takes the memory for as many vectors at once, where FAISS would double it again and again and copy each time."""
    inner: Any = faiss.downcast_index(index)
    match inner:
        case faiss.IndexIDMap() | faiss.IndexPreTransform():
            reserve(inner.index, num_vectors)
        case faiss.IndexRefine():
            reserve(inner.base_index, num_vectors)
            reserve(inner.refine_index, num_vectors)
        case faiss.IndexHNSW():
            reserve(inner.storage, num_vectors)
            graph: Any = inner.hnsw
            _reserve(graph.neighbors, num_vectors * (int(graph.nb_neighbors(0)) + 2))
        case faiss.IndexFlatCodes():
            _reserve(inner.codes, num_vectors * int(inner.code_size))


def _reserve(values: Any, size: int) -> None:
    if hasattr(values, "resize"):
        values.resize(size)
        values.resize(0)  # gives nothing back


def add_numbered(index: Any, matrix: npt.NDArray[np.float32], numbers: npt.NDArray[np.int64]) -> None:
    """Adds vectors [n, d] of these numbers [n], ascending; `index` is from `with_numbers`. JobError if FAISS fails."""
    if not len(numbers):
        return
    first, last = int(numbers[0]), int(numbers[-1])
    counts_itself = index.ntotal == first and last - first == len(numbers) - 1
    try:
        if counts_itself and not isinstance(faiss.downcast_index(index), faiss.IndexIDMap):
            index.add(matrix)
        else:
            index.add_with_ids(matrix, numbers)
    except (RuntimeError, MemoryError) as error:
        raise JobError(f"FAISS can't add vectors {first} to {last}: {faiss_reason(error)}") from error


def write_template(folder: Path, shard: Shard, path: Path, *, dimension: int) -> None:
    """What `shard` was trained to, without its vectors and their numbers. JobError as `read_shard`, UserError where it
    was never trained."""
    index = read_shard(folder, shard, dimension=dimension)
    if not index.is_trained:
        raise UserError(
            "the index holds no vectors, and its kind was trained on none, so that nothing can be added to it; index "
            "both jobs as one"
        )
    index.reset()
    inner: Any = faiss.downcast_index(index)
    faiss.write_index(inner.index if isinstance(inner, faiss.IndexIDMap) else inner, str(path))


def write_index(index: Any, path: Path, *, first_vector: int) -> Contents:
    """Hashed while it is written, and flushed. `path` must not exist. JobError where the storage fails."""
    failed = list[OSError]()
    with storage_errors("writing", path), HashedFile(path) as file:

        def write(block: bytes) -> int:
            try:
                return file.write(block)
            except OSError as error:
                failed.append(error)
                raise

        try:
            faiss.write_index(index, _faiss.PyCallbackIOWriter(write, _BLOCK_BYTES))
        except (RuntimeError, OSError) as error:
            if failed:
                raise failed[0] from None
            raise JobError(f"writing {path} failed: {faiss_reason(error)}") from error
    return Contents(
        file=path.name,
        sha256=file.sha256,
        size_bytes=file.size_bytes,
        first_vector=first_vector,
        num_vectors=index.ntotal,
    )


def check_file(folder: Path, contents: Contents) -> Path:
    """The path of one file of the index. JobError unless its bytes are those that were written."""
    path = folder / contents.file
    if not path.is_file():
        raise JobError(f"{path} is missing; {BUILT_AGAIN}")
    with storage_errors("reading", path):
        damaged = path.stat().st_size != contents.size_bytes or file_sha256(path) != contents.sha256
    if damaged:
        raise JobError(f"{path} is damaged: its sha256 is not the one in index.json; remove it and {BUILT_AGAIN}")
    return path


def read_shard(folder: Path, shard: Shard, *, dimension: int) -> Any:
    """The FAISS index of one shard, which FAISS gets to see only when its hash is right. JobError otherwise."""
    path = check_file(folder, shard)
    try:
        with _deserialization_limits(shard.size_bytes):
            index = faiss.read_index(str(path))
    except (RuntimeError, MemoryError) as error:
        raise JobError(f"{path} can't be read by FAISS: {faiss_reason(error)}") from error
    if index.d != dimension or index.ntotal != shard.num_held or index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise JobError(
            f"{path} holds {index.ntotal} vectors of width {index.d}, "
            f"and index.json says {shard.num_held} of width {dimension} by inner product"
        )
    return index


@contextmanager
def _deserialization_limits(size_bytes: int) -> Iterator[None]:
    """No vector that FAISS reads from a file may be much larger than the file. The setting is the process's."""
    vector_limit = faiss.get_deserialization_vector_byte_limit()
    loop_limit = faiss.get_deserialization_loop_limit()
    faiss.set_deserialization_vector_byte_limit(2 * size_bytes + _LIMIT_SLACK_BYTES)
    faiss.set_deserialization_loop_limit(size_bytes + _LIMIT_SLACK_BYTES)
    try:
        yield
    finally:
        faiss.set_deserialization_vector_byte_limit(vector_limit)
        faiss.set_deserialization_loop_limit(loop_limit)
