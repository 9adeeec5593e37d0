"""An engine that costs nothing, in the place of the real one: what is left is the cost of moving rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.tokenizer import load_tokenizer
from workers.engine.request import EmbedRequest, Finished, GenerateRequest
from workers.engine.stats import EngineStats
from workers.engine_factory import LoadedEngine
from workers.settings import EngineSettings

TEXT = "an answer that cost nothing"


class FreeEngine:
    """Answers every request at the next step with the same text."""

    max_sequences = 1024

    def __init__(self) -> None:
        self.stats = EngineStats()
        self._waiting: list[GenerateRequest] = []

    @property
    def has_work(self) -> bool:
        return bool(self._waiting)

    @property
    def is_idle(self) -> bool:
        return not self._waiting

    def clear_stats(self) -> None:
        self.stats = EngineStats()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return 0

    def add(self, request: GenerateRequest | EmbedRequest) -> None:
        assert isinstance(request, GenerateRequest), "this benchmark generates only"
        self._waiting.append(request)

    def step(self) -> Sequence[Finished]:
        waiting, self._waiting = self._waiting, []
        return [
            Finished(
                request_id=request.request_id,
                token_ids=[1, 2, 3, 4, 5],
                text=TEXT,
                finish_reason="stop",
                prompt_tokens=len(request.token_ids),
            )
            for request in waiting
        ]

    def abort(self, request_id: int) -> None:
        self._waiting = [request for request in self._waiting if request.request_id != request_id]


def load_free_engine(settings: EngineSettings) -> LoadedEngine:
    return LoadedEngine(
        engine=FreeEngine(),
        tokenizer=load_tokenizer(Path(settings.model_path)),
        max_context=8192,
        vector_width=576,
    )
