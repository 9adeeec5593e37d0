"""A request under way: what its samples have come to, and the answer once the last of them is over."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pipeline.errors import RowError
from pipeline.tokenizer import Tokenizer
from workers.engine.endings import Ending
from workers.engine.request import Finished, GenerateRequest, Request
from workers.engine.sequence import Sequence
from workers.engine.stopping import StopSearch


@dataclass(slots=True, kw_only=True)
class Answer:
    """`ending` and `tokenizer` are for generations; `first` is the first sample, which leads to the others."""

    request: Request
    first: Sequence
    ending: Ending | None
    tokenizer: Tokenizer | None
    num_samples: int
    ended: dict[int, Finished] = field(default_factory=dict)
    searches: dict[int, StopSearch] = field(default_factory=dict)
    vector: npt.NDArray[np.float32] | None = None  # of the prompt, where a generation asks for one
    error: RowError | None = None

    def take(self, sequence: Sequence, token: int, logprob: float | None, error: RowError | None) -> bool:
        """Give a sample the token chosen for it, or the error met in choosing -> whether the sample is over."""
        assert self.ending is not None
        self.error = self.error or error
        if self.error is not None:
            sequence.ended_by = "error"
        elif token in self.ending.token_ids or (self.ending.strings and self._search(sequence).push(token)):
            sequence.ended_by = "stop"
        else:
            sequence.tokens.append(token)
            if logprob is not None:
                sequence.logprobs.append(logprob)
            if len(sequence.tokens) < sequence.max_tokens:
                return False
            sequence.ended_by = "length"
        return True

    def end(self, sequence: Sequence) -> list[Finished]:
        """Note that a sample is over, without error -> the answer, if it was the last."""
        self.ended[sequence.sample] = self._finished(sequence)
        if len(self.ended) < self.num_samples:
            return []
        return [self.ended[sample] for sample in range(self.num_samples)]

    def _search(self, sequence: Sequence) -> StopSearch:
        search = self.searches.get(sequence.sample)
        if search is None:
            assert self.tokenizer is not None
            assert self.ending is not None
            search = StopSearch(self.tokenizer.incremental(), self.ending.strings)
            self.searches[sequence.sample] = search
        return search

    def _finished(self, sequence: Sequence) -> Finished:
        assert isinstance(sequence.request, GenerateRequest)
        token_ids = sequence.generated.tolist()
        text, reason = None, sequence.ended_by
        if self.tokenizer is not None:
            search = self.searches.pop(sequence.sample, None)
            if search is None:
                text = self.tokenizer.decode(token_ids)
            else:
                if not search.ended and search.flush():
                    reason = "stop"
                text = search.text
        return Finished(
            request_id=sequence.request.request_id,
            sample=sequence.sample,
            token_ids=token_ids,
            text=text,
            finish_reason=reason,
            logprobs=sequence.logprobs if sequence.request.params.logprobs else None,
            prompt_tokens=sequence.num_prompt,
            vector=None if sequence.sample else self.vector,
        )


def failed(request: Request, error: RowError) -> Finished:
    return Finished(request_id=request.request_id, token_ids=[], prompt_tokens=len(request.token_ids), error=error)
