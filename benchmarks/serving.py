"""One query at a time: a served index against FAISS in this process, on the same vectors, turn by turn in one run.

"nearest" is a vector in, vector numbers and scores out; "search" is a vector in, rows with their ids and texts out.
Both ask the front actor, and that the shards, over connections of their own; "an actor's call" is one of Ray's that
does nothing. FAISS searches with the effort that the index was tuned to.

    python -m benchmarks.serving
    python -m benchmarks.serving --size 10000 --dimension 64 --shards 3
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from jobs.ray_session import ray_session
from pipeline.commits import CommitLog
from pipeline.index.build import build_index
from pipeline.index.effort import search_parameters
from pipeline.index.manifest import IndexManifest, Provenance
from pipeline.index.search import VectorIndex
from pipeline.job_folder import JobFolder, write_job, write_plan
from pipeline.parts import PartBuilder
from pipeline.records import RecordLayout
from workers import devices

ROWS_PER_SPLIT = 4096
TEXT_REPEATS = 20  # some 500 characters a row
K = 10
PAUSE_S = 0.01  # until the threads of the last search, which wait for more by spinning, have gone to sleep


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=100_000, help="vectors")
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--kind", default="Flat")
    parser.add_argument("--queries", type=int, default=500)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        folder = JobFolder(Path(root))
        manifest = write_index(folder, given.size, given.dimension, given.kind, given.shards)
        with ray_session(None, num_cpus=devices.num_cpus()):
            measure(folder, manifest, given.queries)


def write_index(folder: JobFolder, size: int, dimension: int, kind: str, shards: int) -> IndexManifest:
    """A job directory of random vectors, each of a row with a text that is carried along, and its index."""
    log = CommitLog(folder, fingerprint="benchmark")
    log.recover()
    carried = pa.schema([pa.field("body", pa.string())])
    layout = RecordLayout.of(samples=0, embeds="prompt", dimension=dimension, carried=carried)
    random = np.random.default_rng(0)
    splits = []
    for split, first in enumerate(range(0, size, ROWS_PER_SPLIT)):
        count = min(ROWS_PER_SPLIT, size - first)
        vectors = unit(random.standard_normal((count, dimension)))
        builder = PartBuilder(layout, split=split, first_row=first, num_rows=count)
        texts = [f"the text of row {row}, " * TEXT_REPEATS for row in range(first, first + count)]
        builder.carry(first, pa.record_batch({"body": texts}))
        for row in range(count):
            builder.add_vector(first + row, "prompt", vectors[row], prompt_tokens=1)
        log.publish(log.commit(builder.write(folder)))
        splits.append({"index": split, "first_row": first, "num_rows": count})
    write_plan(folder, fingerprint="benchmark", splits=splits, document={})
    spec: dict[str, Any] = {
        "output": {"columns": ["body"]},
        "embed": None,
        "prompt": {"template": None, "column": "body"},
    }
    write_job(folder, fingerprint="benchmark", document={"spec": spec})
    made = Provenance(model="none", model_files={}, tokenizer="none", pooling="mean")
    return build_index(folder, log.commits, job="benchmark", provenance=made, kind=kind, shards=shards)


def measure(folder: JobFolder, manifest: IndexManifest, num_queries: int) -> None:
    import ray

    from workers.index_shard import NAMESPACE
    from workers.serving.index_client import IndexClient
    from workers.serving.index_service import NAME_PREFIX, IndexService, Serving

    serving = Serving(name="bench", out=str(folder.root), folder=str(folder.index), manifest=manifest, engine=None)
    service = IndexService(serving)
    try:
        service.wait_ready()
        client = IndexClient("bench")
        about = client.about()
        front = ray.get_actor(NAME_PREFIX + "bench", namespace=NAMESPACE)
        plain = [faiss.read_index(str(folder.index / shard.file)) for shard in manifest.shards]
        efforts = [search_parameters(index, shard.effort) for index, shard in zip(plain, manifest.shards, strict=True)]
        here = VectorIndex.open(folder.index)
        queries = unit(np.random.default_rng(1).standard_normal((num_queries, manifest.dimension)))
        faiss.omp_set_num_threads(devices.num_cpus())
        ways: dict[str, Callable[[npt.NDArray[np.float32]], object]] = {
            "FAISS, in this process": lambda query: [
                index.search(query, K, params=effort) for index, effort in zip(plain, efforts, strict=True)
            ],
            "this index, in this process": lambda query: here.search(query, K),
            "an actor's call, through Ray": lambda query: ray.get(front.ping.remote()),
            "served, nearest": lambda query: client.nearest(query, K),
            "served, search": lambda query: client.search_vectors(query, K),
        }
        times = timed(ways, queries)
    finally:
        service.close()
    print(
        f"{manifest.num_vectors:,} x {manifest.dimension}, {manifest.kind}, {len(manifest.shards)} shards, k {K}; "
        f"asked by {about['asked_by']}, shards by {about['shards_asked_by']}"
    )
    base = times["FAISS, in this process"]
    for name, taken in times.items():
        added = np.median(taken - base)  # of queries, each in all ways within the same tenths of a second
        print(
            f"{name:28} median {np.median(taken):7.2f} ms, p99 {np.percentile(taken, 99):7.2f} ms, "
            f"on top of FAISS {added:6.2f} ms"
        )


def timed(
    ways: dict[str, Callable[[npt.NDArray[np.float32]], object]], queries: npt.NDArray[np.float32]
) -> dict[str, npt.NDArray[np.float64]]:
    """Milliseconds of each query in each way; the first tenth only warms up. All ways take turns, in any order."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    random = np.random.default_rng(2)
    for number in range(len(queries)):
        for name in random.permutation(list(ways)).tolist():
            ask = ways[name]
            time.sleep(PAUSE_S)
            begun = time.perf_counter()
            ask(queries[number : number + 1])
            taken[name].append((time.perf_counter() - begun) * 1e3)
    return {name: np.array(each[len(each) // 10 :]) for name, each in taken.items()}


def unit(matrix: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    units: npt.NDArray[np.float32] = (matrix / np.linalg.norm(matrix, axis=1, keepdims=True)).astype(np.float32)
    return units


if __name__ == "__main__":
    main()
