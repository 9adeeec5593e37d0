"""A shard without Ray: rows on disk, a cheap engine, and assignments made by hand."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.job_folder import JobFolder
from pipeline.prompts import PromptSettings
from pipeline.source import Source, Split
from workers.assignment import Assignment, FinishedAssignment
from workers.job_runner import build_runner
from workers.row_runner import RowRunner
from workers.settings import EmbedSettings, EngineSettings, JobSettings, load_callable


class Desk:
    """One job's folder and shard. `run` has assignments run to their end and returns them by split."""

    def __init__(self, tmp_path: Path, model: Path, rows: pa.Table, **options: Any) -> None:
        path = tmp_path / "rows.parquet"
        pq.write_table(rows, path)
        self.source = Source.open(str(path))
        self.splits: list[Split] = self.source.splits(options.pop("rows_per_split", 8))
        self.folder = JobFolder(tmp_path / "out")
        self.folder.create()
        generates, embed = options.pop("generates", {"max_new_tokens": 4}), options.pop("embed", None)
        engine = {"max_context": options.pop("max_context", None)}
        self.engine = EngineSettings(model_path=str(model), factory="cheap_engine:load", **engine)
        self.job = JobSettings(
            out=str(self.folder.root),
            source=self.source.to_json(),
            prompt=PromptSettings(**{"column": "body"} | options.pop("prompt", {})),
            on_too_long=options.pop("on_too_long", "error"),
            date="2026-01-01T00:00:00+00:00",
            sampling=generates,
            embed=EmbedSettings(**embed) if embed else None,
            **options,
        )
        self.runner: RowRunner = build_runner(load_callable(self.engine.factory)(self.engine), self.engine, self.job)
        self._thread: threading.Thread | None = None

    def assignment(self, split: int, **changes: Any) -> Assignment:
        whole = {"split": self.splits[split].to_json(), "revision": 0, "start": 0, "stop": self.splits[split].num_rows}
        return Assignment(**whole | changes)

    def start(self) -> None:
        self._thread = threading.Thread(target=self.runner.run, daemon=True)
        self._thread.start()

    def run(self, assignments: list[Assignment], *, timeout_s: float = 60.0) -> dict[int, FinishedAssignment]:
        if self._thread is None:
            self.start()
        self.runner.grant(assignments)
        finished: dict[int, FinishedAssignment] = {}
        deadline = time.monotonic() + timeout_s
        while len(finished) < len(assignments):
            report = self.runner.report(0.1)
            assert report.failure is None, report.failure
            assert time.monotonic() < deadline, "the shard does not finish"
            finished |= {one.index: one for one in report.finished}
        return finished

    def table(self, finished: FinishedAssignment) -> pa.Table:
        return pq.read_table(self.folder.root / finished.attempt["path"], partitioning=None)

    def stop(self) -> None:
        self.runner.stop()
        if self._thread is not None:
            self._thread.join(60)
            assert not self._thread.is_alive()


@pytest.fixture
def desk(tmp_path: Path, tiny_tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Desk]]:
    """`desk(texts, **settings)`: a shard over rows with the columns body and title."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    made: list[Desk] = []

    def make(texts: list[Any], **options: Any) -> Desk:
        rows = pa.table({"body": texts, "title": [f"title {row}" for row in range(len(texts))]})
        made.append(Desk(tmp_path, tiny_tokenizer_dir, rows, **options))
        return made[-1]

    yield make
    for one in made:
        one.stop()


@pytest.fixture(scope="session")
def most_likely() -> Callable[[Any, list[int], list[int]], list[int]]:
    """`most_likely(model of transformers, prompt, text)`: what it would put in place of each token of text, and next.

    It says the same text by itself, greedily, if it puts the same in each place: by induction over the prefixes.
    """
    import torch

    def after_each_prefix(model: Any, prompt: list[int], text: list[int]) -> list[int]:
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + text])).logits[0]
        found: list[int] = logits[len(prompt) - 1 :].argmax(-1).tolist()
        return found

    return after_each_prefix
