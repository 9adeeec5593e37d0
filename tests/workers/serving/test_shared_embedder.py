"""One embedder for all who ask a served index."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pipeline.errors import RowError
from workers.query_embedder import SharedEmbedder, Vector


def test_who_brings_many_texts_does_not_keep_others_waiting_for_all_of_them() -> None:
    batches: list[list[str]] = []
    has_begun, may_end = threading.Event(), threading.Event()

    def embed(texts: Sequence[str]) -> list[Vector | RowError]:
        batches.append(list(texts))
        has_begun.set()
        assert may_end.wait(60)
        return [np.array([float(text)], np.float32) for text in texts]

    shared = SharedEmbedder(embed, batch_texts=4)
    with ThreadPoolExecutor(2) as threads:
        many = threads.submit(shared.embed, [str(number) for number in range(10)])
        assert has_begun.wait(60)
        one = threads.submit(shared.embed, ["99"])
        while not shared._waiting:
            assert not one.done()
        may_end.set()
        assert np.array(many.result()).tolist() == [[float(number)] for number in range(10)]
        assert np.array(one.result()).tolist() == [[99.0]]
    assert batches[0] == ["0", "1", "2", "3"]
    assert batches[1][0] == "99"
    assert SharedEmbedder(embed).embed([]) == []
