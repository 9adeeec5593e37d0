"""The shards of one index as one: searched side by side, and asked again where one was replaced.

q: queries; k: hits a query; d: width of a vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pipeline.index.selection import Mask
from workers.index_shard import Found, holding_request, search_request
from workers.serving.query_line import REPLACING_S, Carrier, QueryLine

_HOLDERS: Final = 64  # asked at once


class ShardGroup:
    """`shards` are IndexShardActors, by number. May be used by several threads at once.

    `version` is the digest of the manifest that they are to answer by (see `IndexManifest.digest`); `patience_s` how
    long a search waits for the replacement of a shard that died under it.
    """

    def __init__(self, shards: Sequence[Any], version: str, *, patience_s: float = REPLACING_S) -> None:
        self._version = version
        self._lines = [
            QueryLine(shard, f"shard {number}", patience_s=patience_s) for number, shard in enumerate(shards)
        ]

    def search(self, queries: npt.NDArray[np.float32], k: int, allowed: Sequence[Mask] | None = None) -> list[Found]:
        """Each shard's answer, to be merged by `best`, among the vectors `allowed` of each shard, or among all.

        JobError where one has none within seconds.
        """
        if allowed is None:
            requests = [search_request(self._version, queries, k, None)] * len(self._lines)
        else:
            requests = [search_request(self._version, queries, k, mask) for mask in allowed]
        calls = [line.send(request) for line, request in zip(self._lines, requests, strict=True)]
        try:
            answers = [call.answer() for call in calls]
        finally:
            for call in calls:
                call.drop()
        return [(scores, numbers) for scores, numbers in (answer.arrays for answer in answers)]

    def hold(self) -> None:
        """Returns when every shard can answer by this version. JobError where one can't."""
        with ThreadPoolExecutor(_HOLDERS) as threads:  # a port may take seconds to be given up
            list(threads.map(lambda line: line.ask(holding_request(self._version)), self._lines))

    @property
    def carrier(self) -> Carrier:
        """How shards are asked: "ray" where one of them can't be reached otherwise."""
        return "ray" if any(line.carrier == "ray" for line in self._lines) else "socket"

    def close(self) -> None:
        for line in self._lines:
            line.close()
