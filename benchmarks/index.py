"""The index against plain FAISS: building from committed parts, and batched search, from 10,000 vectors to a million.

Vectors are a mixture: clusters of unequal size, spread in few of 384 dimensions with a little noise in all; seeded.
Both sides read the same Parquet files, give FAISS as many threads, train on as many vectors and write what they built.
Plain FAISS is what a person would write: read batches, train, add, write_index. Ours also hashes and flushes its files,
maps rows, measures recall against exact search and tunes the effort; how long the last two took is told apart, and
counts, though most of it runs in a thread beside FAISS, as reading does. How much processor time both sides took is
compared too.
Each build is a process of its own, whose peak memory (all of the process) is compared; before its clock starts it has
built a few vectors, so that neither side's imports count, and nothing of an earlier build is there. Searches of both
sides take turns over one index in memory, with the effort that ours found; the best of three counts.

    python -m benchmarks.index --sizes 10000 100000
    python -m benchmarks.index --sizes 1000000 --kinds HNSW32 --json index.json     # parts of a run, one by one
    python -m benchmarks.index --sizes --json index.json --plot docs/index.svg      # draws what the file holds

With one thread a million vectors take about 10 minutes without HNSW, whose share is about half a millisecond a vector
for each side.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from benchmarks.svg import Chart, draw
from pipeline.commits import CommitLog
from pipeline.index import recall, shard_build
from pipeline.index.budget import build_budget
from pipeline.index.build import build_index
from pipeline.index.effort import search_parameters
from pipeline.index.kinds import num_lists
from pipeline.index.manifest import Provenance
from pipeline.index.search import IndexShard, VectorIndex
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
WARMING_VECTORS = 400
WARMING_KIND = "IVF4,Flat"
KINDS = {"Flat": "Flat", "IVF,Flat": "IVF", "IVF,SQ8": "IVF, 8 bits", "HNSW32": "HNSW"}  # and what the plot calls them
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
    with measuring_timed() as measuring:
        start = time.perf_counter()
        manifest = build_index(
            folder, log.commits, job="benchmark", provenance=PROVENANCE, kind=kind, shards=1, threads=threads
        )
        seconds = time.perf_counter() - start
    (shard,) = manifest.shards
    return {
        "seconds": seconds,
        "measuring_seconds": sum(measuring),
        "recall": manifest.recall.reached,
        "effort": shard.effort,
        "bytes": shard.size_bytes,
    }


@contextmanager
def measuring_timed() -> Iterator[list[float]]:
    """How long each exact search of a batch and each tuning took that was done in the block, in seconds."""
    taken = list[float]()

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            found = function(*arguments, **named)
            taken.append(time.perf_counter() - start)
            return found

        return run

    with (
        mock.patch.object(shard_build, "tune", timed(recall.tune)),
        mock.patch.object(recall.ExactSearch, "add", timed(recall.ExactSearch.add)),
    ):
        yield taken


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
    """Seconds for all queries: plain FAISS, our shard with its answers in order, and hits with the rows they are of.

    All ask one index in memory: of two that are read from the same file the first may be a sixth slower.
    """
    opened = VectorIndex.open(root / "index")
    (shard,) = opened.manifest.shards
    plain: Any = faiss.read_index(str(root / "index" / shard.file))
    ours = dataclasses.replace(opened, shards=(IndexShard(plain, shard, kind=opened.manifest.kind),))
    del opened
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
            write_parts(warm(root), WARMING_VECTORS)
            return {}
        case "ours" | "plain":
            build = build_ours if name == "ours" else build_plain
            build(warm(root), WARMING_KIND, threads)
            before = time.process_time()
            found = build(root, kind, threads)
            cpu_seconds = time.process_time() - before
            peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            return found | {"cpu_seconds": cpu_seconds, "peak_bytes": peak_bytes}
        case _:
            return search(root, threads)


def warm(root: Path) -> Path:
    """The job directory of a few vectors."""
    return root.with_name("warm")


def clear(root: Path) -> None:
    """Takes what was built there away."""
    (root / "plain.faiss").unlink(missing_ok=True)
    for folder in (root / "index", root / "index-versions"):
        shutil.rmtree(folder, ignore_errors=True)


def measure(size: int, names: Sequence[str], threads: int, scratch: Path | None) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        root = Path(folder) / "out"
        in_a_process("parts", root, "-", size, threads)
        for name in names:
            kind = name.replace("IVF", f"IVF{num_lists(size)}")
            for path in (root, warm(root)):
                clear(path)
            plain = in_a_process("plain", root, kind, size, threads)
            (root / "plain.faiss").unlink()
            shutil.rmtree(warm(root) / "index", ignore_errors=True)
            ours = in_a_process("ours", root, kind, size, threads)
            found = in_a_process("search", root, kind, size, threads)
            yield {
                "vectors": size,
                "name": KINDS[name],
                "kind": kind,
                "recall": ours["recall"],
                "effort": ours["effort"],
                "build_s": ours["seconds"],
                "measuring_s": ours["measuring_seconds"],
                "plain_build_s": plain["seconds"],
                "build_ratio": plain["seconds"] / ours["seconds"],
                "cpu_ratio": plain["cpu_seconds"] / ours["cpu_seconds"],  # what counts where every core has work
                "memory_ratio": ours["peak_bytes"] / plain["peak_bytes"],
                "peak_bytes": ours["peak_bytes"],
                "plain_queries_per_s": QUERIES / found["plain"],
                "queries_per_s": QUERIES / found["shards"],
                "search_ratio": found["plain"] / found["shards"],
                "hits_ratio": found["plain"] / found["hits"],
            }


COLUMNS = (
    "vectors", "kind", "build, s", "recall, s", "speed", "by processor time", "peak, MiB", "memory",
    "recall@10", "effort", "queries a second", "speed", "with rows",
)  # fmt: skip


def show(result: dict[str, Any]) -> None:
    row(
        f"{result['vectors']:,}",
        result["kind"],
        f"{result['build_s']:.2f}",
        f"{result['measuring_s']:.2f}",
        result["build_ratio"],
        result["cpu_ratio"],
        f"{result['peak_bytes'] / 2**20:,.0f}",
        result["memory_ratio"],
        f"{result['recall']:.3f}",
        result["effort"],
        f"{result['queries_per_s']:,.0f}",
        result["search_ratio"],
        result["hits_ratio"],
    )


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
    parser.add_argument(
        "--sizes", type=int, nargs="*", default=[10_000, 100_000, 1_000_000], help="numbers of vectors; none: only draw"
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="these alone, HNSW32 at any size")
    parser.add_argument("--hnsw", type=int, default=100_000, help="without --kinds: HNSW up to so many vectors")
    parser.add_argument("--threads", type=int, default=1, help="of both sides")
    parser.add_argument("--scratch", type=Path, help="folder for some gigabytes, instead of the system's")
    parser.add_argument("--plot", type=Path, help="write a plot, as SVG")
    parser.add_argument("--json", type=Path, help="keep the numbers there, beside those of other runs")
    parser.add_argument("--step", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        name, root, kind, size, threads = options.step
        print(json.dumps(step(name, Path(root), kind, int(size), int(threads))))
        return
    known = json.loads(options.json.read_text()) if options.json is not None and options.json.exists() else []
    results = {(result["vectors"], result["name"]): result for result in known}
    if options.plot is not None and len({*options.sizes, *(size for size, _ in results)}) < 2:
        parser.error("--plot shows how it grows: measure two sizes, or name the --json of runs that did")
    print(f"{DIMENSION} dimensions, {options.threads} threads; ratios are speed and memory over plain FAISS's\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for size in options.sizes:
        names = options.kinds or [name for name in KINDS if name != "HNSW32" or size <= options.hnsw]
        for result in measure(size, names, options.threads, options.scratch):
            show(result)
            results[size, result["name"]] = result
            if options.json is not None:
                options.json.write_text(json.dumps(in_order(results), indent=1) + "\n")
    if not options.sizes:
        for result in in_order(results):
            show(result)
    if options.plot is not None:
        options.plot.write_text(plot(in_order(results)))


def in_order(results: Mapping[tuple[int, str], dict[str, Any]]) -> list[dict[str, Any]]:
    names = list(KINDS.values())
    return [results[key] for key in sorted(results, key=lambda key: (key[0], names.index(key[1])))]


if __name__ == "__main__":
    main()
