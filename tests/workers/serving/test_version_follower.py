"""Who follows an index's versions goes on whatever happens to one of them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from pipeline.index.manifest import IndexManifest, Provenance, read_manifest
from tests.pipeline.index.indexed_job import finished_job, unit
from workers.serving.version_follower import VersionFollower


class Service:
    """Takes versions, but for the third, which fails in a way that nobody thought of."""

    def __init__(self, manifest: IndexManifest) -> None:
        self.manifest = manifest
        self.seen = {version: threading.Event() for version in (2, 3, 4)}

    def take_version(self, manifest: IndexManifest) -> None:
        self.seen[manifest.version].set()
        if manifest.version == 3:
            raise AssertionError("unheard of")
        self.manifest = manifest


def test_versions_are_followed_also_when_one_fails_and_nobody_can_be_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.serving.version_follower.LOOK_S", 0.01)
    provenance = Provenance(model="tiny", model_files={}, tokenizer="aa", pooling="mean")
    job = finished_job(tmp_path, "one", unit(9, seed=1), provenance=provenance)
    service: Any = Service(read_manifest(job.folder.index))
    told: list[str] = []

    def tell(words: str) -> None:
        told.append(words)
        raise BrokenPipeError

    follower = VersionFollower(service, job.folder.index, tell)
    for version, seen in service.seen.items():
        job.delete(version)
        assert seen.wait(60), version
    follower.stop()
    follower.join()
    assert service.manifest.version == 4
    assert told == [
        "now serving version 2: 8 vectors",
        "still serving version 2, not what is there by now: AssertionError: unheard of",
        "now serving version 4: 6 vectors",
    ]
