"""Places in the plane: near where vectors are near, the same again, for any number of vectors."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import numpy.typing as npt
import pytest

from pipeline.projection import FEWEST_FOR_TSNE, Projection, principal_axes, spread

Matrix = npt.NDArray[np.float32]


def clouds(count: int, *, num_clouds: int = 4, seed: int = 0) -> tuple[Matrix, npt.NDArray[np.int64]]:
    """Unit vectors around a few directions, and around which."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(num_clouds, 32))
    cloud = random.integers(num_clouds, size=count)
    vectors = centres[cloud] + 0.3 * random.normal(size=(count, 32))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), cloud


def purity(places: Matrix, cloud: npt.NDArray[np.int64], of: Matrix, of_cloud: npt.NDArray[np.int64]) -> float:
    """How often the nearest of `places` is of the same cloud."""
    distances = np.square(of[:, None] - places).sum(axis=2)
    if of is places:
        np.fill_diagonal(distances, np.inf)
    return float((cloud[distances.argmin(axis=1)] == of_cloud).mean())


@pytest.fixture(scope="module")
def laid_out() -> tuple[Projection, Matrix, npt.NDArray[np.int64]]:
    vectors, cloud = clouds(200)
    return Projection(vectors), vectors, cloud


def test_neighbours_stay_neighbours(laid_out: tuple[Projection, Matrix, npt.NDArray[np.int64]]) -> None:
    projection, _, cloud = laid_out
    assert projection.method == "t-SNE"
    assert purity(projection.places, cloud, projection.places, cloud) > 0.98


def test_the_same_vectors_are_laid_out_the_same(laid_out: tuple[Projection, Matrix, npt.NDArray[np.int64]]) -> None:
    projection, vectors, _ = laid_out
    np.testing.assert_array_equal(Projection(vectors).places, projection.places)


def test_others_are_placed_among_their_neighbours_each_by_itself(
    laid_out: tuple[Projection, Matrix, npt.NDArray[np.int64]],
) -> None:
    projection, _, cloud = laid_out
    others, other_cloud = clouds(300, seed=1)
    placed = projection.place(others)
    assert purity(projection.places, cloud, placed, other_cloud) > 0.98
    np.testing.assert_allclose(placed[7:9], projection.place(others[7:9]), atol=1e-3)


def test_a_landmark_is_placed_where_it_lies(laid_out: tuple[Projection, Matrix, npt.NDArray[np.int64]]) -> None:
    projection, vectors, _ = laid_out
    np.testing.assert_allclose(projection.place(vectors), projection.places, atol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 3, FEWEST_FOR_TSNE - 1])
def test_few_vectors_lie_along_their_principal_axes(count: int) -> None:
    vectors, _ = clouds(count)
    projection = Projection(vectors)
    assert projection.method == "PCA"
    assert projection.places.shape == (count, 2)
    assert np.isfinite(projection.place(vectors)).all()


def test_equal_vectors_have_places_too() -> None:
    vectors = np.ones((60, 4), np.float32) / 2
    places = Projection(vectors).places
    assert np.isfinite(places).all()
    assert len(np.unique(places, axis=0)) > 50, "each is to be pointed at"


def test_principal_axes_are_those_of_the_greatest_differences() -> None:
    random = np.random.default_rng(0)
    flat = random.normal(size=(100, 2)) * [5.0, 1.0]
    turn, _ = np.linalg.qr(random.normal(size=(6, 6)))
    places = principal_axes((flat @ turn[:2]).astype(np.float32))
    wanted = flat - flat.mean(axis=0)
    assert abs(np.corrcoef(places[:, 0], wanted[:, 0])[0, 1]) > 0.99
    assert places.std(axis=0) == pytest.approx(wanted.std(axis=0), rel=0.05)


def test_scikit_learn_is_not_loaded_for_few_vectors() -> None:
    code = (
        "import sys, numpy as np; from pipeline.projection import Projection; "
        "Projection(np.eye(5, dtype=np.float32)); sys.exit('sklearn' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_places_are_spread_over_all_and_fall_in_with_nothing_that_repeats() -> None:
    assert spread(0, 5).tolist() == []
    assert spread(3, 5).tolist() == [0, 1, 2]
    places = spread(10_000, 5000)
    assert (places // 2).tolist() == list(range(5000)), "one of each two"
    assert 0.4 < (places % 2).mean() < 0.6, "of which now the one is drawn, now the other"
    assert (spread(10_000, 5000) == places).all()
