"""A served version of an index whose directory goes on without it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import JobError
from pipeline.index.manifest import Provenance, read_manifest
from pipeline.index.matching import matching_vectors
from tests.pipeline.index.indexed_job import finished_job, unit
from workers.serving.served_version import ServedVersion


def test_a_new_filter_for_a_version_whose_files_are_gone_is_to_be_asked_again(tmp_path: Path) -> None:
    provenance = Provenance(model="tiny", model_files={"model.safetensors": "aa"}, tokenizer="bb", pooling="mean")
    job = finished_job(tmp_path, "one", unit(30, seed=1), provenance=provenance)
    job.delete(0)
    version = ServedVersion(job.folder.root, job.folder.index, read_manifest(job.folder.index), [])
    job.delete(1)
    assert version._allowed("key == 'one-3'")
    job.delete(2)
    assert version._allowed("key == 'one-3'"), "it is known"
    with pytest.raises(JobError, match=r"^version 2 of the index in .* is not there any more; ask again in a moment$"):
        version._allowed("key == 'one-4'")


def test_a_filter_that_is_known_waits_for_none_that_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    provenance = Provenance(model="tiny", model_files={"model.safetensors": "aa"}, tokenizer="bb", pooling="mean")
    job = finished_job(tmp_path, "one", unit(30, seed=1), provenance=provenance)
    version = ServedVersion(job.folder.root, job.folder.index, read_manifest(job.folder.index), [])
    known = version._allowed("key == 'one-3'")
    is_looking, may_end = threading.Event(), threading.Event()

    def look(*arguments: Any) -> Any:
        is_looking.set()
        assert may_end.wait(60)
        return matching_vectors(*arguments)

    monkeypatch.setattr("workers.serving.served_version.matching_vectors", look)
    with ThreadPoolExecutor(2) as threads:
        other = threads.submit(version._allowed, "key == 'one-4'")
        assert is_looking.wait(60)
        try:
            assert threads.submit(version._allowed, "key == 'one-3'").result(60) is known
        finally:
            may_end.set()
        assert np.flatnonzero(other.result()[0]).tolist() == [4]
