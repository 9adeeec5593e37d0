"""Building an index in a process of its own: what memory it takes there, and what is left when it is killed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pipeline.commits import CommitLog
from pipeline.index.budget import build_budget
from pipeline.index.build import build_index, index_is_current
from pipeline.index.manifest import Provenance
from pipeline.job_folder import JobFolder

Committed = Callable[..., tuple[JobFolder, CommitLog]]

BUILD = """
import ctypes, sys
from pathlib import Path
import faiss, numpy as np
from pipeline.commits import CommitLog
from pipeline.index.build import build_index
from pipeline.index.manifest import Provenance
from pipeline.job_folder import JobFolder
from pipeline.parts import PartBuilder
from pipeline.records import RecordLayout

def vectors(first, count, dimension):
    found = np.random.default_rng(first).normal(size=(count, dimension)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)

def committed(folder, num_vectors, dimension):
    log = CommitLog(folder, fingerprint="this job")
    log.recover()
    if not log.commits:
        layout = RecordLayout.of(samples=0, embeds="prompt", dimension=dimension)
        for split, first in enumerate(range(0, num_vectors, 4000)):
            count = min(4000, num_vectors - first)
            builder = PartBuilder(layout, split=split, first_row=first, num_rows=count)
            for row, vector in enumerate(vectors(first, count, dimension), first):
                builder.add_vector(row, "prompt", vector, prompt_tokens=1)
            log.publish(log.commit(builder.write(folder)))
    return log

def memory(name):
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) * 1024

faiss.omp_set_num_threads(1)
folder = JobFolder(Path(sys.argv[1]))
PROVENANCE = Provenance(model="tiny", model_files={"model.safetensors": "aa"}, tokenizer="bb", pooling="mean")
"""

MEASURED = (
    BUILD
    + """
kind, num_vectors, memory_bytes = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
log = committed(folder, num_vectors, 128)
warm = JobFolder(folder.root / "warm")
build_index(warm, committed(warm, 400, 128).commits, job="mine", provenance=PROVENANCE, kind=kind, recall=0)
ctypes.CDLL(None).malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = memory("VmRSS")
manifest = build_index(
    folder, log.commits, job="mine", provenance=PROVENANCE, kind=kind, shards=None, memory_bytes=memory_bytes, recall=0
)
print(len(manifest.shards), memory("VmHWM") - before)
"""
)

ALLOCATORS_BYTES = 6 << 20  # that the threads' allocators keep: 0 to 4.5 MiB, another each time


@pytest.mark.parametrize(
    ("kind", "memory_bytes"), [("IVF16,Flat", 36 << 20), ("SQ8", 32 << 20), ("Flat", 32 << 20), ("IVF16,Flat", 1 << 30)]
)
def test_building_keeps_to_its_budget(tmp_path: Any, kind: str, memory_bytes: int) -> None:
    """24,000 vectors of 512 bytes: 12 MB. Where the budget is small the index is cut."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path / "out"), kind, "24000", str(memory_bytes)],
        capture_output=True,
        text=True,
        check=True,
    )
    shards, taken = map(int, done.stdout.split())
    budget = build_budget(kind, 24_000, 128, memory_bytes=memory_bytes)
    assert shards == budget.shards
    assert (shards > 1) == (kind == "IVF16,Flat" and memory_bytes < 1 << 30)
    assert budget.peak_bytes(1) <= memory_bytes
    assert taken <= budget.peak_bytes(1) + ALLOCATORS_BYTES
    assert taken > 0 or kind == "Flat", "which takes less than can be told"


KILLED = (
    BUILD
    + """
import os, signal
from pipeline.index import shard_build

write_index = shard_build.faiss_files.write_index
def dies(index, path, *, first_vector):
    written = write_index(index, path, first_vector=first_vector)
    if first_vector:
        os.kill(os.getpid(), signal.SIGKILL)
    return written
shard_build.faiss_files.write_index = dies
if sys.argv[2] == "second":
    shard_build.faiss_files.write_index = write_index
    real = os.rename
    def late(source, target):
        real(source, target)
        if str(target).endswith("shard-001.faiss") and "-shards" not in str(target):
            os.kill(os.getpid(), signal.SIGKILL)
    os.rename = late
log = committed(folder, 600, 16)
build_index(folder, log.commits, job="mine", provenance=PROVENANCE, kind="HNSW8", shards=3)
"""
)


@pytest.mark.parametrize("moment", ["first", "second"])
def test_killed_while_it_is_built_an_index_is_built_again_with_the_same_bytes(
    committed: Committed, provenance: Provenance, moment: str
) -> None:
    chance = np.random.default_rng(0)
    vectors = chance.normal(size=(600, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    folder, log = committed(vectors)
    made: dict[str, Any] = {"job": "mine", "provenance": provenance, "kind": "HNSW8", "shards": 3}
    build_index(folder, log.commits, **made)
    whole = {path.name: path.read_bytes() for path in folder.index.iterdir()}
    for path in folder.index.iterdir():
        path.unlink()
    folder.index.rmdir()
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder.root), moment], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert not folder.index.exists()
    assert any(folder.attempts.iterdir())
    again = CommitLog(folder, fingerprint="this job")
    again.recover()
    assert not any(folder.attempts.iterdir())
    assert not index_is_current(folder, again.commits, **made)
    build_index(folder, again.commits, **made)
    assert {path.name: path.read_bytes() for path in folder.index.iterdir()} == whole
