"""A job directory with committed vectors, small and made of chosen numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from pipeline.commits import CommitLog
from pipeline.errors import RowError
from pipeline.index.faiss_files import faiss_threads
from pipeline.index.manifest import Provenance
from pipeline.job_folder import JobFolder
from pipeline.parts import PartBuilder
from pipeline.records import RecordLayout
from tests.pipeline.index.indexed_job import Make, finished_job

ROWS_A_SPLIT = 7


@pytest.fixture(autouse=True)
def one_faiss_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine take most of the time of indexes as small as these."""
    with faiss_threads(1):
        yield


@pytest.fixture
def provenance() -> Provenance:
    return Provenance(model="tiny", model_files={"model.safetensors": "aa"}, tokenizer="bb", pooling="mean")


@pytest.fixture
def job(tmp_path: Path, provenance: Provenance) -> Make:
    """`job(name, vectors, **arguments)` -> a finished job with an index."""
    return functools.partial(finished_job, tmp_path, provenance=provenance)


@pytest.fixture
def committed(tmp_path: Path) -> Callable[..., tuple[JobFolder, CommitLog]]:
    """`committed(vectors)` -> a job that embeds prompts, whose row i has vectors[i], or failed where that is NaN."""

    def make(vectors: npt.NDArray[np.float32], *, name: str = "out") -> tuple[JobFolder, CommitLog]:
        folder = JobFolder(tmp_path / name)
        log = CommitLog(folder, fingerprint="this job")
        log.recover()
        layout = RecordLayout.of(samples=0, embeds="prompt", dimension=vectors.shape[1])
        for split, first in enumerate(range(0, len(vectors), ROWS_A_SPLIT)):
            builder = PartBuilder(
                layout, split=split, first_row=first, num_rows=min(ROWS_A_SPLIT, len(vectors) - first)
            )
            for row, vector in enumerate(vectors[first : first + ROWS_A_SPLIT], first):
                if np.isnan(vector).any():
                    builder.fail(row, RowError("internal", "no"))
                else:
                    builder.add_vector(row, "prompt", vector, prompt_tokens=1)
            log.publish(log.commit(builder.write(folder)))
        return folder, log

    return make
