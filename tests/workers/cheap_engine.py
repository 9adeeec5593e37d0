"""An engine that computes nothing, for tests of everything around it: answers are a function of the prompt's text.

Words in a prompt make it misbehave: DIE (the process is killed), BREAK (a step raises), REFUSE (adding raises), NAN and
ZERO (such a vector), SILENT (an empty generation), FAIL (an error row), and HANG (a step that never ends).
`cheap.json` in the model's folder: {"step_s": seconds a step takes, while the file says so, "rows_a_step": how many
end in it, "refuses": false to take what says REFUSE, "once": a file, made by the one process that is broken by BREAK or
HANG}.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import RowError
from pipeline.tokenizer import load_tokenizer
from workers.engine.request import EmbedRequest, Finished, GenerateRequest
from workers.engine.stats import EngineStats
from workers.engine_factory import LoadedEngine
from workers.settings import EngineSettings

WIDTH = 8


class CheapEngine:
    def __init__(self, settings: EngineSettings) -> None:
        model = Path(settings.model_path)
        self._options = model / "cheap.json"
        options = self._read_options()
        self.tokenizer = load_tokenizer(model)
        self.is_slow = "step_s" in options
        self.rows_a_step = options.get("rows_a_step", 256)
        self.stats = EngineStats()
        self.refuses = options.get("refuses", True)
        self.once = options.get("once")
        self.most_waiting = 0
        self._waiting: deque[GenerateRequest | EmbedRequest] = deque()

    def add(self, request: GenerateRequest | EmbedRequest) -> None:
        if self.refuses and "REFUSE" in self._text(request):
            raise ValueError("this request is refused")
        self._waiting.append(request)
        self.most_waiting = max(self.most_waiting, len(self._waiting))

    def abort(self, request_id: int) -> None:
        self._waiting = deque(request for request in self._waiting if request.request_id != request_id)

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

    def step(self) -> list[Finished]:
        self._take_time()
        finished: list[Finished] = []
        # the last come first, so that rows finish out of order
        for _ in range(min(self.rows_a_step, len(self._waiting))):
            finished += self._answer(self._waiting.pop() if len(finished) % 2 else self._waiting.popleft())
        self.stats.steps += 1
        return finished

    def _read_options(self) -> dict[str, Any]:
        return json.loads(self._options.read_text()) if self._options.exists() else {}

    def _take_time(self) -> None:
        began = time.monotonic()
        while self.is_slow and time.monotonic() - began < self._read_options().get("step_s", 0.0):
            time.sleep(0.01)

    def _first_time(self, what: str) -> bool:
        if self.once is None:
            return True
        mark = Path(f"{self.once}.{what}")
        is_first = not mark.exists()
        mark.touch()
        return is_first

    def _text(self, request: GenerateRequest | EmbedRequest) -> str:
        return self.tokenizer.decode(request.token_ids)

    def _answer(self, request: GenerateRequest | EmbedRequest) -> list[Finished]:
        text, num_tokens = self._text(request), len(request.token_ids)
        if "DIE" in text:
            os.kill(os.getpid(), signal.SIGKILL)
        if "BREAK" in text and self._first_time("BREAK"):
            raise RuntimeError("this step breaks")
        if "HANG" in text and self._first_time("HANG"):
            os.kill(os.getpid(), signal.SIGSTOP)
        if isinstance(request, EmbedRequest):
            return [
                Finished(request_id=request.request_id, token_ids=[], prompt_tokens=num_tokens, vector=vector_of(text))
            ]
        if "FAIL" in text:
            error = RowError("nonfinite", "the logits hold NaN")
            return [Finished(request_id=request.request_id, token_ids=[], prompt_tokens=num_tokens, error=error)]
        return [
            Finished(
                request_id=request.request_id,
                sample=sample,
                token_ids=list(request.token_ids[:3]),
                text="" if "SILENT" in text else answer_to(text, request.key, sample),
                finish_reason="stop",
                logprobs=[-0.5] * 3 if request.params.logprobs else None,
                prompt_tokens=num_tokens,
                vector=vector_of(text) if request.vector is not None and sample == 0 else None,
            )
            for sample in range(request.params.n)
        ]


def answer_to(prompt: str, key: int, sample: int) -> str:
    return f"{hashlib.sha256(prompt.encode()).hexdigest()[:8]} {key}.{sample}"


def vector_of(text: str) -> np.ndarray:
    if "NAN" in text:
        return np.full(WIDTH, np.nan, np.float32)
    if "ZERO" in text:
        return np.zeros(WIDTH, np.float32)
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest()[:WIDTH], np.uint8).astype(np.float32) + 1
    return digest / np.linalg.norm(digest)


def load(settings: EngineSettings) -> LoadedEngine:
    engine = CheapEngine(settings)
    return LoadedEngine(
        engine=engine,
        tokenizer=engine.tokenizer,
        max_context=settings.max_context or 512,
        vector_width=WIDTH,
    )
