"""Vectors of a corpus -> places in the plane, near to each other where the vectors are.

A few vectors are laid out together: by t-SNE (van der Maaten and Hinton 2008), or along their two principal axes where
they are too few to have neighbourhoods. Any number of others is then placed among them, each by itself, so that a
corpus of any size is laid out in bounded memory. The same vectors give the same places again.

n: vectors; d: their width; m: laid out together.
"""

from __future__ import annotations

from typing import Final, Literal

import faiss
import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float32]
Places = npt.NDArray[np.float32]  # [n, 2]

FEWEST_FOR_TSNE: Final = 50
_PERPLEXITY: Final = 30.0  # scikit-learn's default; fewer where there are few vectors
_ITERATIONS: Final = 500
_NUM_NEIGHBOURS: Final = 8


class Projection:
    """Places vectors [n, d] among `landmarks` [m, d], m >= 1, which it lays out when it is made.

    With one core a thousand landmarks take about two seconds and 5,000 about twenty; placing takes 2 * m * d
    multiplications a vector.
    """

    def __init__(self, landmarks: Matrix) -> None:
        self.method: Literal["t-SNE", "PCA"] = "t-SNE" if len(landmarks) >= FEWEST_FOR_TSNE else "PCA"
        self.places = _tsne(landmarks) if self.method == "t-SNE" else principal_axes(landmarks)
        self._landmarks = landmarks

    def place(self, vectors: Matrix) -> Places:
        """Each at the mean of its nearest landmarks, weighted by how near they are; on a landmark, where that is."""
        count = min(_NUM_NEIGHBOURS, len(self._landmarks))
        squares, nearest = faiss.knn(vectors, self._landmarks, count)  # [n, k]
        # Seen from a vector, as far as the k-th is out of sight.
        sight = np.maximum(squares[:, -1:], 1e-12)
        weights = np.exp(-4.0 * squares / sight)
        on_it = squares[:, 0] < 1e-6
        weights[on_it, 1:] = 0.0
        placed = (weights[:, :, None] * self.places[nearest]).sum(axis=1) / weights.sum(axis=1, keepdims=True)
        return np.asarray(placed, np.float32)


def spread(length: int, count: int) -> npt.NDArray[np.int64]:
    """At most `count` of the places 0 to length - 1, ascending: one drawn from each of `count` stretches of one length.

    Places at equal distances would fall in with whatever repeats at that distance, as every second vector is one of a
    prompt. Asked again it draws the same.
    """
    count = min(length, count)
    bounds = np.arange(count + 1, dtype=np.int64) * length // max(count, 1)
    return np.random.default_rng(0).integers(bounds[:-1], bounds[1:])


def principal_axes(vectors: Matrix) -> Places:
    """Along the two directions in which the vectors differ most; each axis points to where its largest part is."""
    centred = vectors.astype(np.float64) - vectors.mean(axis=0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    places = np.zeros((len(vectors), 2))
    found = centred @ axes[:2].T
    found *= np.where(found[np.abs(found).argmax(axis=0), np.arange(found.shape[1])] < 0, -1.0, 1.0)
    places[:, : found.shape[1]] = found
    return places.astype(np.float32)


def _tsne(vectors: Matrix) -> Places:
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # several threads round sums another way each time, which t-SNE makes visible
        layout = TSNE(
            perplexity=min(_PERPLEXITY, len(vectors) / 5),
            init=_beginning(vectors),
            max_iter=_ITERATIONS,
            random_state=0,
        )
        places: Places = np.asarray(layout.fit_transform(vectors), np.float32)
        return places


def _beginning(vectors: Matrix) -> Places:
    """The principal axes, made small as scikit-learn makes them, and shaken: equal places would stay equal for ever."""
    places = principal_axes(vectors)
    shaken = places / max(float(places[:, 0].std()), 1e-12) + np.random.default_rng(0).normal(0.0, 0.05, places.shape)
    return np.asarray(1e-4 * shaken, np.float32)
