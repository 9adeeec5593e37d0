"""How much of what an exact search finds a shard finds, and the least effort at which that is enough.

Queries are vectors of the corpus, drawn by a seed, that are not trained on and don't find themselves. While vectors
stream past on their way into a shard, each query keeps its best KEPT of them by exact search; afterwards the shard is
asked for the best K with one effort after another. A found vector counts if its exact score is that of the K-th best or
better, so that of vectors that score alike any is right. A query of which more score alike than KEPT can tell nothing
and is left out.

q: queries; n, d: vectors and their width.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pipeline.index.effort import effort_name, most_effort, search_parameters
from pipeline.index.manifest import Trial
from pipeline.index.search import Numbers, Scores, best

Matrix = npt.NDArray[np.float32]

K: Final = 10
KEPT: Final = 64
NUM_QUERIES: Final = 256

_COMPARED_AT_ONCE: Final = 1024  # with all queries: a megabyte of scores
_SEED: Final = 0x67726973746D696C
_LEAST_EF_SEARCH: Final = 16  # less than K does not search less
_MOST_EF_SEARCH: Final = 4096
_ALIKE: Final = 2e-6  # float32 rounding of the inner product of two unit vectors


@dataclass(frozen=True, slots=True, kw_only=True)
class Queries:
    numbers: Numbers  # [q] ascending: which vectors of the corpus they are
    matrix: Matrix  # [q, d]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The best of each query, best first; number -1 and score -inf stand for nothing. Merged by `best`."""

    scores: Scores  # [q, k]
    numbers: Numbers  # [q, k]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """A shard's effort, what it finds with it, and the way there."""

    effort: int | None
    recall: float | None
    trials: tuple[Trial, ...]
    seconds: tuple[float, ...]  # of all queries together, a trial
    found: Found


def num_queries(num_vectors: int) -> int:
    """How many of the vectors are queries: NUM_QUERIES, and at most a quarter of all."""
    return min(NUM_QUERIES, num_vectors // 4)


def query_numbers(num_vectors: int) -> Numbers:
    """Which vectors are queries. Ascending, always the same."""
    count = num_queries(num_vectors)
    drawn: Numbers = np.random.default_rng(_SEED).choice(num_vectors, count, replace=False, shuffle=False)
    return np.sort(drawn).astype(np.int64)


class ExactSearch:
    """The best KEPT vectors of each query among those that were added, without the query itself."""

    def __init__(self, queries: Queries) -> None:
        self._queries = queries
        shape = len(queries.numbers), 0
        self.found = Found(scores=np.empty(shape), numbers=np.empty(shape, np.int64))

    def add(self, matrix: Matrix, numbers: Numbers) -> None:
        """Vectors [n, d] of these numbers [n], ascending."""
        if len(self._queries.numbers):
            some = [slice(first, first + _COMPARED_AT_ONCE) for first in range(0, len(matrix), _COMPARED_AT_ONCE)]
            self.found = merged([self.found, *(self._found_among(matrix[one], numbers[one]) for one in some)], KEPT)

    def _found_among(self, matrix: Matrix, numbers: Numbers) -> Found:
        """Of each query those that may be among its best."""
        queries = self._queries
        scores: npt.NDArray[Any] = queries.matrix @ matrix.T  # [q, n]
        places = np.minimum(np.searchsorted(numbers, queries.numbers), len(numbers) - 1)
        itself = np.flatnonzero(numbers[places] == queries.numbers)
        scores[itself, places[itself]] = -np.inf
        if self.found.numbers.shape[1] == KEPT:
            found = _better(scores, self.found.scores[:, -1:])
        else:
            k = min(KEPT, len(matrix))
            best_places = np.argpartition(scores, -k, axis=1)[:, -k:]
            found = Found(scores=np.take_along_axis(scores, best_places, axis=1), numbers=best_places)
        return Found(scores=found.scores, numbers=np.where(np.isneginf(found.scores), -1, numbers[found.numbers]))


def _better(scores: Matrix, least: Scores) -> Found:
    """Those of `scores` [q, n] that are above `least` [q, 1]: as many a query as any has; -inf stands for nothing."""
    is_better = scores > least.astype(np.float32)  # which they are of: nothing is rounded
    queries, places = np.divmod(np.flatnonzero(is_better), scores.shape[1])  # `nonzero` takes ten times as long
    counts = np.bincount(queries, minlength=len(scores))
    columns = np.arange(len(queries)) - (np.cumsum(counts) - counts)[queries]
    shape = len(scores), int(counts.max(initial=0))
    found = Found(scores=np.full(shape, -np.inf), numbers=np.full(shape, -1))
    found.scores[queries, columns] = scores[queries, places]
    found.numbers[queries, columns] = places
    return found


def without_itself(found: Found, queries: Queries) -> Found:
    itself = found.numbers == queries.numbers[:, None]
    return Found(scores=np.where(itself, -np.inf, found.scores), numbers=np.where(itself, -1, found.numbers))


def merged(found: list[Found], k: int) -> Found:
    scores, numbers = best([(one.scores, one.numbers) for one in found], k)
    return Found(scores=scores, numbers=numbers)


def recall_of(found: Found, exact: Found) -> tuple[float | None, int]:
    """The share of the K nearest that were found, and of how many queries. None where no query tells anything."""
    wanted = np.minimum((exact.numbers >= 0).sum(axis=1), K)  # [q]
    if exact.numbers.shape[1] == 0 or not wanted.any():
        return None, 0
    threshold = np.take_along_axis(exact.scores, np.maximum(wanted - 1, 0)[:, None], axis=1) - _ALIKE
    is_right = (exact.scores >= threshold) & (exact.numbers >= 0)
    tells = (wanted > 0) & ~((exact.numbers.shape[1] >= KEPT) & is_right[:, KEPT - 1 :].any(axis=1))
    if not tells.any():
        return None, 0
    right = np.where(is_right, exact.numbers, -1)[tells]
    hits = np.minimum(_in_common(found.numbers[tells], right), wanted[tells])
    return round(float(hits.sum() / wanted[tells].sum()), 6), int(tells.sum())


def _in_common(found: Numbers, right: Numbers) -> Numbers:
    """Of each query [q, ...] how many numbers, -1 aside, are in both; each is there once at most."""
    both = np.sort(np.concatenate([found, right], axis=1), axis=1)
    twice: Numbers = ((both[:, 1:] == both[:, :-1]) & (both[:, 1:] >= 0)).sum(axis=1)
    return twice


def tune(index: Any, queries: Queries, exact: Found, target: float, *, more_than: int = 0) -> Tuned:
    """Searches `index` with more and more effort, beginning above `more_than`, until the recall is `target`.

    Where that is never reached the result has the most effort. Where nothing can be measured, too: it costs least where
    there are few vectors, and where all vectors are alike.
    """
    trials, seconds = list[Trial](), list[float]()
    while True:
        effort, is_last = next(step for step in _ladder(index) if step[1] or step[0] is None or step[0] > more_than)
        start = time.perf_counter()
        found = _search(index, queries, effort)
        took = time.perf_counter() - start
        recall, _ = recall_of(found, exact)
        if recall is not None:
            trials.append(Trial(effort=effort, recall=recall))
            seconds.append(took)
        if is_last or (recall is not None and recall >= target):
            return Tuned(effort=effort, recall=recall, trials=tuple(trials), seconds=tuple(seconds), found=found)
        assert effort is not None
        more_than = effort


def _search(index: Any, queries: Queries, effort: int | None) -> Found:
    k = min(K + 1, index.ntotal)
    if k == 0 or not len(queries.numbers):
        shape = len(queries.numbers), 0
        return Found(scores=np.empty(shape), numbers=np.empty(shape, np.int64))
    scores, numbers = index.search(queries.matrix, k, params=search_parameters(index, effort))
    found = Found(scores=scores.astype(np.float64), numbers=numbers)
    return merged([without_itself(found, queries)], K)


def _ladder(index: Any) -> Iterator[tuple[int | None, bool]]:
    """Efforts in powers of two, and whether one is the last."""
    most = most_effort(index, index.ntotal)
    if most is None:
        yield None, True
        return
    effort = 1
    if effort_name(index) == "efSearch":
        effort, most = _LEAST_EF_SEARCH, min(most, _MOST_EF_SEARCH)
    while effort < most:
        yield effort, False
        effort *= 2
    yield most, True
