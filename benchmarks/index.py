"""The index against plain FAISS: building from committed parts, and batched search, from 10,000 vectors to a million.

Vectors are a mixture: clusters of unequal size, spread in few of 384 dimensions with a little noise in all; seeded.
Both sides read the same Parquet files with as many threads, train on as many vectors and write what they built. Plain
FAISS is what a person would write: read batches, train, add, write_index. Ours also hashes and flushes its files, maps
rows, measures recall against exact search and tunes the effort. Each build is a process of its own, whose peak memory
(all of the process) is compared. Searches of both sides take turns in one process over the same file, with the effort
that ours found; the best of three counts.

    python -m benchmarks.index --sizes 10000 100000
    python -m benchmarks.index --plot docs/index.svg --json index.json      # also 1,000,000: see below

With one thread a million vectors take about 10 minutes without HNSW, whose share is 1 to 2 ms a vector for each side.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from benchmarks.svg import Chart, draw
from pipeline.commits import CommitLog
from pipeline.index.budget import build_budget
from pipeline.index.build import build_index
from pipeline.index.effort import search_parameters
from pipeline.index.kinds import num_lists
from pipeline.index.manifest import Provenance
from pipeline.index.search import VectorIndex
from pipeline.job_folder import JobFolder
from pipeline.parts import PartBuilder
from pipeline.records import RecordLayout

Matrix = npt.NDArray[np.float32]

DIMENSION = 384
CLUSTERS = 200
SPREAD_DIMENSIONS = 10
PART_ROWS = 20_000
BATCH_ROWS = 8192
QUERIES = 1000
K = 10
TURNS = 3
PROVENANCE = Provenance(model="none", model_files={}, tokenizer="", pooling="mean")


def mixture(seed: int, count: int) -> Matrix:
    """Unit vectors [count, DIMENSION]; clusters are the same for every seed."""
    fixed = np.random.default_rng(0)
    centres = fixed.normal(size=(CLUSTERS, DIMENSION)) / np.sqrt(DIMENSION)
    shares = 1 / np.arange(1, CLUSTERS + 1) ** 0.7
    spread = np.linalg.qr(fixed.normal(size=(DIMENSION, SPREAD_DIMENSIONS)))[0].T
    chance = np.random.default_rng(seed)
    chosen = chance.choice(CLUSTERS, count, p=shares / shares.sum())
    inner = chance.normal(size=(count, SPREAD_DIMENSIONS)) @ spread * (0.8 / np.sqrt(SPREAD_DIMENSIONS))
    vectors = centres[chosen] + inner + chance.normal(size=(count, DIMENSION)) * (0.15 / np.sqrt(DIMENSION))
    unit: Matrix = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return unit


def write_parts(root: Path, num_vectors: int) -> None:
    folder = JobFolder(root)
    log = CommitLog(folder, fingerprint="benchmark")
    log.recover()
    layout = RecordLayout.of(samples=0, embeds="prompt", dimension=DIMENSION)
    for split, first in enumerate(range(0, num_vectors, PART_ROWS)):
        count = min(PART_ROWS, num_vectors - first)
        builder = PartBuilder(layout, split=split, first_row=first, num_rows=count)
        for row, vector in enumerate(mixture(1 + split, count), first):
            builder.add_vector(row, "prompt", vector, prompt_tokens=1)
        log.publish(log.commit(builder.write(folder)))


def build_ours(root: Path, kind: str, threads: int) -> dict[str, Any]:
    folder = JobFolder(root)
    log = CommitLog(folder, fingerprint="benchmark")
    log.recover()
    start = time.perf_counter()
    manifest = build_index(
        folder, log.commits, job="benchmark", provenance=PROVENANCE, kind=kind, shards=1, threads=threads
    )
    seconds = time.perf_counter() - start
    (shard,) = manifest.shards
    return {"seconds": seconds, "recall": manifest.recall.reached, "effort": shard.effort, "bytes": shard.size_bytes}


def build_plain(root: Path, kind: str, threads: int) -> dict[str, Any]:
    parts = sorted((root / "parts").glob("*.parquet"))
    num_vectors = sum(pq.read_metadata(part).num_rows for part in parts)
    wanted = build_budget(kind, num_vectors, DIMENSION).training_vectors
    faiss.omp_set_num_threads(threads)
    start = time.perf_counter()
    index: Any = faiss.index_factory(DIMENSION, kind, faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        step = num_vectors // wanted
        sample, first = [], 0
        for batch in plain_batches(parts):
            sample.append(batch[-first % step :: step])
            first += len(batch)
        index.train(np.concatenate(sample)[:wanted])
        del sample
    for batch in plain_batches(parts):
        index.add(batch)
    faiss.write_index(index, str(root / "plain.faiss"))
    return {"seconds": time.perf_counter() - start}


def plain_batches(parts: list[Path]) -> Any:
    for part in parts:
        with pq.ParquetFile(part) as file:
            for batch in file.iter_batches(BATCH_ROWS, columns=["embedding"]):
                values: Any = batch["embedding"]
                yield values.flatten().to_numpy().reshape(-1, DIMENSION)


def search(root: Path, threads: int) -> dict[str, Any]:
    """Seconds for all queries: plain FAISS, our shard with its answers in order, and hits with the rows they are of."""
    ours = VectorIndex.open(root / "index")
    (shard,) = ours.manifest.shards
    plain: Any = faiss.read_index(str(root / "index" / shard.file))
    parameters = search_parameters(plain, shard.effort)
    queries = mixture(0, QUERIES)
    faiss.omp_set_num_threads(threads)
    ways: dict[str, Callable[[], Any]] = {
        "plain": lambda: plain.search(queries, K, params=parameters),
        "shards": lambda: ours.shards[0].search(queries, K),
        "hits": lambda: ours.search(queries, K, threads=threads),
    }
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(TURNS):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def in_a_process(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.index", "--step", *map(str, arguments)]
    threads = str(arguments[-1])
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def step(name: str, root: Path, kind: str, size: int, threads: int) -> dict[str, Any]:
    match name:
        case "parts":
            write_parts(root, size)
            return {}
        case "ours" | "plain":
            found = (build_ours if name == "ours" else build_plain)(root, kind, threads)
            return found | {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        case _:
            return search(root, threads)


def kinds_of(size: int, most_hnsw: int) -> dict[str, str]:
    kinds = {"Flat": "Flat", "IVF": f"IVF{num_lists(size)},Flat", "IVF, 8 bits": f"IVF{num_lists(size)},SQ8"}
    return kinds | ({"HNSW": "HNSW32"} if size <= most_hnsw else {})


def measure(size: int, threads: int, most_hnsw: int, scratch: Path | None) -> list[dict[str, Any]]:
    results = []
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        root = Path(folder) / "out"
        in_a_process("parts", root, "-", size, threads)
        for name, kind in kinds_of(size, most_hnsw).items():
            plain, ours = (in_a_process(who, root, kind, size, threads) for who in ("plain", "ours"))
            found = in_a_process("search", root, kind, size, threads)
            result = {
                "vectors": size,
                "name": name,
                "kind": kind,
                "recall": ours["recall"],
                "effort": ours["effort"],
                "build_s": ours["seconds"],
                "plain_build_s": plain["seconds"],
                "build_ratio": plain["seconds"] / ours["seconds"],
                "memory_ratio": ours["peak_bytes"] / plain["peak_bytes"],
                "peak_bytes": ours["peak_bytes"],
                "plain_queries_per_s": QUERIES / found["plain"],
                "queries_per_s": QUERIES / found["shards"],
                "search_ratio": found["plain"] / found["shards"],
                "hits_ratio": found["plain"] / found["hits"],
            }
            results.append(result)
            row(
                f"{size:,}", kind, f"{ours['seconds']:.1f}", result["build_ratio"],
                f"{ours['peak_bytes'] / 2**20:,.0f}", result["memory_ratio"], f"{ours['recall']:.3f}", ours["effort"],
                f"{result['queries_per_s']:,.0f}", result["search_ratio"], result["hits_ratio"],
            )  # fmt: skip
    return results


def row(*values: object) -> None:
    print("|", " | ".join(f"{v:.2f}" if isinstance(v, float) else str(v) for v in values), "|", flush=True)


def plot(results: list[dict[str, Any]]) -> str:
    """Kinds that were measured at every size, as lines over sizes."""
    sizes = sorted({result["vectors"] for result in results})
    by_name = {name: [r for r in results if r["name"] == name] for name in dict.fromkeys(r["name"] for r in results)}
    whole = {name: found for name, found in by_name.items() if len(found) == len(sizes)}

    def chart(title: str, value: Any) -> Chart:
        lines = {name: [float(value(result)) for result in found] for name, found in whole.items()}
        return Chart(title=title, x_label="vectors", xs=sizes, lines=lines)

    return draw(
        [
            chart("Building: speed over plain FAISS's", lambda r: r["build_ratio"]),
            chart("Batched search: speed over plain FAISS's", lambda r: r["search_ratio"]),
            chart("Queries a second, as a power of ten", lambda r: np.log10(r["queries_per_s"])),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="numbers of vectors")
    parser.add_argument("--hnsw", type=int, default=100_000, help="HNSW up to so many vectors; slow beyond")
    parser.add_argument("--threads", type=int, default=1, help="of both sides")
    parser.add_argument("--scratch", type=Path, help="folder for some gigabytes, instead of the system's")
    parser.add_argument("--plot", type=Path, help="write a plot, as SVG")
    parser.add_argument("--json", type=Path, help="write the numbers")
    parser.add_argument("--step", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        name, root, kind, size, threads = options.step
        print(json.dumps(step(name, Path(root), kind, int(size), int(threads))))
        return
    print(f"{DIMENSION} dimensions, {options.threads} threads; ratios are speed and memory over plain FAISS's\n")
    columns = (
        "vectors", "kind", "build, s", "speed", "peak, MiB", "memory", "recall@10", "effort", "queries a second",
        "speed", "with rows",
    )  # fmt: skip
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    results = [
        result for size in options.sizes for result in measure(size, options.threads, options.hnsw, options.scratch)
    ]
    if options.plot is not None:
        options.plot.write_text(plot(results))
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
