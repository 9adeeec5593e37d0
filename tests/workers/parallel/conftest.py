"""Made-up routing: skewed, and of tokens that come from one of several domains."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

Choices = list[NDArray[np.int64]]


@pytest.fixture(scope="session")
def domain_choices() -> Callable[..., Choices]:
    """[T, k] choices a layer; a token's domain, one of `domains`, makes its own experts likelier."""

    def make(*, layers: int, experts: int, top_k: int, tokens: int, domains: int, seed: int = 0) -> Choices:
        rng = np.random.default_rng(seed)
        choices = []
        for _ in range(layers):
            domain_of = rng.permutation(experts) % domains
            scores = np.log(1 + rng.pareto(1.5, experts)) + rng.gumbel(size=(tokens, experts))
            scores += 3.0 * (domain_of == rng.integers(domains, size=tokens)[:, None])
            choices.append(np.sort(np.argsort(-scores, axis=1)[:, :top_k], axis=1))
        return choices

    return make
