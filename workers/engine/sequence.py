"""One sample on its way through the engine: its tokens, how far its cache reaches, and where its blocks lie."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import Enum

from workers.engine.request import EmbedRequest, GenerateRequest


class Phase(Enum):
    WAITING = "waiting"  # holds no blocks
    RUNNING = "running"  # holds blocks
    ENDED = "ended"  # finished, failed or aborted; holds no blocks


@dataclass(slots=True, eq=False)
class Sequence:
    """Mutable, and owned by the scheduler; the engine only appends tokens and sets `ended_by`.

    `order` is (arrival of the request, sample): older sequences are served first. `tokens` are the prompt's and then
    the generated ones; positions below `num_computed` have their keys and values in the blocks of `tables` (one table a
    layer group; -1 where no later position reads the block and it was given back). `digests` are those of its leading
    full blocks, as far as they were needed.
    """

    request: GenerateRequest | EmbedRequest
    order: tuple[int, int]
    tokens: array[int]
    num_prompt: int
    max_tokens: int  # prompt and generated; the sequence ends when it is this long
    tables: list[array[int]]
    num_trimmed: list[int]  # of a group's table: leading entries of which those that nobody reads any more are -1
    reuses_prefix: bool
    takes_argmax: bool
    num_computed: int = 0
    settled: bool = False  # ran a whole step since it was admitted, so what `tables` holds below num_computed is there
    phase: Phase = Phase.WAITING
    digests: list[bytes] = field(default_factory=list)
    siblings_to_come: int = 0  # samples of this request that start when its prompt is computed
    elder: Sequence | None = None  # the first sample, whose prompt blocks this one shares
    most_reused: int = 0  # tokens of a prompt that is pooled which may be found in the cache: the rest is computed
    awaits_vector: bool = False  # of the prompt, and it is not whole yet
    ended_by: str | None = None  # "stop", "length", "vector" or "error"
    logprobs: list[float] = field(default_factory=list)

    @property
    def sample(self) -> int:
        return self.order[1]

    @property
    def generated(self) -> array[int]:
        return self.tokens[self.num_prompt :]
