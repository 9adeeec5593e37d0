"""An index has the same bytes whoever builds its shards: one thread, several, or Ray tasks, also tasks that die."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pipeline.commits import CommitLog
from pipeline.errors import JobError
from pipeline.index.build import build_index
from pipeline.index.builders import Builders, ThreadBuilders
from pipeline.index.manifest import Provenance
from pipeline.index.shard_build import build_shard
from pipeline.job_folder import JobFolder
from pipeline.parts import PartBuilder
from pipeline.records import RecordLayout
from workers.index_builders import RayBuilders, builders_at_hand

pytestmark = pytest.mark.ray

PROVENANCE = Provenance(model="tiny", model_files={"model.safetensors": "aa"}, tokenizer="bb", pooling="mean")


@pytest.fixture
def committed(tmp_path: Path) -> tuple[JobFolder, CommitLog]:
    chance = np.random.default_rng(0)
    vectors = (chance.normal(size=(12, 16))[chance.integers(0, 12, 900)] + 0.7 * chance.normal(size=(900, 16))).astype(
        "f4"
    )
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    folder = JobFolder(tmp_path / "out")
    log = CommitLog(folder, fingerprint="this job")
    log.recover()
    layout = RecordLayout.of(samples=0, embeds="prompt", dimension=16)
    for split, first in enumerate(range(0, 900, 200)):
        rows: list[npt.NDArray[np.float32]] = list(vectors[first : first + 200])
        builder = PartBuilder(layout, split=split, first_row=first, num_rows=len(rows))
        for row, vector in enumerate(rows, first):
            builder.add_vector(row, "prompt", vector, prompt_tokens=1)
        log.publish(log.commit(builder.write(folder)))
    return folder, log


def build(committed: tuple[JobFolder, CommitLog], builders: Builders, **settings: Any) -> dict[str, bytes]:
    folder, log = committed
    settings = {"kind": "Flat", "shards": 3, "job": "mine", "provenance": PROVENANCE, **settings}
    build_index(folder, log.commits, builders=builders, **settings)
    return {path.name: path.read_bytes() for path in folder.index.iterdir()}


@pytest.mark.parametrize("kind", ["Flat", "IVF8,SQ8", "HNSW8"])
def test_side_by_side_or_one_after_the_other_the_files_are_the_same(
    committed: tuple[JobFolder, CommitLog], ray_cluster: str, kind: str
) -> None:
    alone = build(committed, ThreadBuilders(1), kind=kind, center=True)
    assert set(alone) == {"index.json", "rows.parquet", "center.npy", *(f"shard-00{n}.faiss" for n in range(3))}
    assert build(committed, ThreadBuilders(3), kind=kind, center=True) == alone
    assert build(committed, RayBuilders(), kind=kind, center=True) == alone


def test_a_shard_whose_process_dies_is_built_again(
    committed: tuple[JobFolder, CommitLog], ray_cluster: str, tmp_path: Path
) -> None:
    def dies_once(task: Any) -> Any:
        mark = tmp_path / f"died-{task.number}"
        if task.number == 1 and not mark.exists():
            mark.touch()
            build_shard(task)
            os.kill(os.getpid(), signal.SIGKILL)
        return build_shard(task)

    assert build(committed, RayBuilders(dies_once), kind="HNSW8") == build(committed, ThreadBuilders(1), kind="HNSW8")
    assert (tmp_path / "died-1").exists()


@pytest.mark.parametrize("make", [lambda: ThreadBuilders(3), RayBuilders])
def test_what_a_shard_says_is_wrong_is_one_line_and_leaves_nothing(
    committed: tuple[JobFolder, CommitLog], ray_cluster: str, make: Callable[[], Builders]
) -> None:
    folder, _ = committed
    folder.part(3).write_bytes(folder.part(2).read_bytes()[:1000])
    with pytest.raises(JobError, match=r"part-000003\.parquet can't be read") as caught:
        build(committed, make())
    assert "\n" not in str(caught.value)
    assert os.listdir(folder.attempts) == []
    assert not folder.index.exists()


def test_a_ray_that_is_connected_is_used(ray_cluster: str) -> None:
    assert isinstance(builders_at_hand(), RayBuilders)
