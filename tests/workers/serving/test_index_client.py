"""What a client sends to the front of a served index."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from workers.serving.index_client import IndexClient
from workers.serving.query_messages import Message


@pytest.mark.parametrize(
    ("method", "k", "expected"),
    [
        ("search_vectors", 10, [512, 512, 6]),
        ("search_vectors", 100, [51] * 20 + [10]),
        ("search_vectors", 10**30, [1] * 1030),
        ("search_texts", 100, [51] * 20 + [10]),
        ("nearest", 1000, [512, 512, 6]),
        ("nearest", 1 << 18, [4] * 257 + [2]),
    ],
)
def test_the_more_hits_are_asked_for_the_fewer_queries_go_together(method: str, k: int, expected: list[int]) -> None:
    sent: list[int] = []

    def ask(request: Message) -> Message:
        sent.append(len(request.arrays[0] if request.arrays else request.values["texts"]))
        return Message([[]] * sent[-1], (np.empty((sent[-1], 0)), np.empty((sent[-1], 0), np.int64)))

    client: Any = object.__new__(IndexClient)
    client._line = SimpleNamespace(ask=ask)
    queries: Any = ["a text"] * 1030 if method == "search_texts" else np.ones((1030, 2))
    assert len(getattr(client, method)(queries, k)) == 1030
    assert sent == expected
