"""Philox against the known answers of its authors' Random123 distribution (kat_vectors, philox4x32-10)."""

import numpy as np
import pytest

from workers.engine.philox import philox4x32, uniform

KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> tuple[np.ndarray, ...]:
    return tuple(np.array([int(word, 16)], dtype=np.uint64) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_it_gives_the_authors_known_answers(counter: str, key: str, answer: str) -> None:
    assert philox4x32(words(counter), words(key)) == words(answer)


def u64(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint64)


def test_a_number_does_not_depend_on_its_neighbours_in_the_call() -> None:
    together = uniform(u64(7, 7, 8), u64(1, 2**63 + 5, 1), u64(0, 3, 0), u64(10, 11, 10))
    alone = [
        uniform(u64(s), u64(k), u64(n), u64(p))[0]
        for s, k, n, p in [(7, 1, 0, 10), (7, 2**63 + 5, 3, 11), (8, 1, 0, 10)]
    ]
    assert together.tolist() == alone


@pytest.mark.parametrize("changed", range(4))
def test_every_argument_counts_in_all_its_bits(changed: int) -> None:
    widths = [64, 64, 32, 32]
    base = [3, 4, 5, 6]
    seen = set()
    for bit in range(widths[changed]):
        arguments = list(base)
        arguments[changed] ^= 1 << bit
        seen.add(float(uniform(*(u64(a) for a in arguments))[0]))
    assert len(seen) == widths[changed]


def test_the_numbers_are_spread_evenly_over_zero_to_one() -> None:
    n = 20_000
    zeros = np.zeros(n, dtype=np.uint64)
    numbers = uniform(zeros, zeros, zeros, np.arange(n, dtype=np.uint64))
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
    assert ((counts - n / 20) ** 2 / (n / 20)).sum() < 43.8  # chi-squared with 19 degrees of freedom, p = 0.001
