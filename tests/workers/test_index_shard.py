"""A shard's actor, without Ray: it answers by the shard that it was started for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.index.manifest import IndexManifest, Provenance, read_manifest
from pipeline.index.versions import versions_present
from tests.pipeline.index.indexed_job import finished_job, unit
from workers.index_shard import IndexShardActor


def test_empty_shards_are_told_apart_by_their_numbers(tmp_path: Path) -> None:
    provenance = Provenance(model="tiny", model_files={}, tokenizer="aa", pooling="mean")
    one = finished_job(tmp_path, "one", unit(5, seed=1), provenance=provenance, shards=2)
    two = finished_job(tmp_path, "two", unit(4, seed=2), provenance=provenance)
    one.add(two)
    one.delete(*range(5))
    manifest = one.compact([two])
    assert manifest.shards[0].sha256 == manifest.shards[1].sha256
    queries = unit(1, seed=3)
    found = []
    for number, shard in enumerate(manifest.shards):
        actor = IndexShardActor(str(one.folder.index), manifest, number, neighbours=1)
        _, numbers = actor.search(manifest.digest, queries, 9, np.ones(shard.num_vectors, np.bool_))
        found.extend(numbers[numbers >= 0].tolist())
    assert sorted(found) == [5, 6, 7, 8]


def test_an_index_that_changes_while_a_shard_reads_it_is_not_taken_for_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    provenance = Provenance(model="tiny", model_files={}, tokenizer="aa", pooling="mean")
    job = finished_job(tmp_path, "one", unit(9, seed=1), provenance=provenance)
    changes = [(2, 3), (4,)]  # as many as come while it looks for its version

    def present(folder: Path) -> list[tuple[Path, IndexManifest]]:
        found = versions_present(folder)
        for number in changes.pop(0) if changes else ():
            job.delete(number)
        return found

    monkeypatch.setattr("workers.index_shard.versions_present", present)
    actor = IndexShardActor(str(job.folder.index), job.delete(1), 0, neighbours=1)
    assert actor._loaded.wait(60)
    assert actor.ping() == ("ready", "")
    assert not changes
    manifest = read_manifest(job.folder.index)
    changes.append((8,))
    _, numbers = actor.search(manifest.digest, unit(1, seed=3), 9)
    assert sorted(numbers[0].tolist()) == [0, 5, 6, 7, 8]
