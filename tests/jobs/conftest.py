"""Jobs on a real Ray, started once, with an engine that computes nothing (`tests/workers/cheap_engine.py`)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.jobs.processes import actors_of

ROOT = Path(__file__).parents[2]
ENGINES = ROOT / "tests" / "workers"
CHEAP = "cheap_engine:load"


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """The address of a Ray of 4 CPUs, which this process is connected to."""
    import ray

    from jobs.ray_session import ray_session

    on_sigterm = signal.getsignal(signal.SIGTERM)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ENGINES), *([before] if before else [])])
    try:
        with ray_session(None, num_cpus=4):
            started = [" ".join(child.cmdline()) for child in psutil.Process().children()]
            assert any("raylet" in command for command in started)
            assert not any(name in command for command in started for name in ("dashboard.py", "monitor.py"))
            assert signal.getsignal(signal.SIGTERM) is on_sigterm, "it is still the caller's"
            yield ray.get_runtime_context().gcs_address
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


@pytest.fixture
def cheap_model(tmp_path: Path, tiny_tokenizer_dir: Path) -> Callable[..., Path]:
    """A model's folder for the cheap engine: `cheap_model(step_s=0.1)`; `cheap_model()` hastens jobs that run, too."""

    def make(**options: Any) -> Path:
        folder = tmp_path / "model"
        if not folder.exists():
            shutil.copytree(tiny_tokenizer_dir, folder)
            (folder / "config.json").write_text('{"model_type": "llama"}')
            (folder / "model.safetensors").write_bytes(b"weights")
        (folder / "cheap.json.new").write_text(json.dumps(options))
        (folder / "cheap.json.new").replace(folder / "cheap.json")
        return folder

    return make


@pytest.fixture
def job(tmp_path: Path, cheap_model: Callable[..., Path]) -> Callable[..., dict[str, Any]]:
    """`job(texts, **settings)`: the settings of a job over rows with the columns body and title."""

    def make(texts: list[Any], **settings: Any) -> dict[str, Any]:
        path = tmp_path / "rows.parquet"
        pq.write_table(pa.table({"body": texts, "title": [f"title {row}" for row in range(len(texts))]}), path)
        model = cheap_model() if not (tmp_path / "model").exists() else tmp_path / "model"
        defaults: dict[str, Any] = {
            "name": "test",
            "model": str(model),
            "input": {"path": str(path)},
            "prompt": {"column": "body"},
            "generate": {"max_new_tokens": 4},
            "embed": {"of": "both"},
            "output": {"path": str(tmp_path / "out"), "rows_per_split": 8},
            "cluster": {"threads": 1},
        }
        return defaults | settings

    return make


NUM_MOE_ROWS = 54
MOE_TEXT = "a tuple is immutable while the with statement closes files when an error occurs inside of it"


def moe_settings(
    model: Path, folder: Path, name: str, *, max_new_tokens: int = 12, engine: Any = None, **cluster: Any
) -> dict[str, Any]:
    """A job in `folder` whose rows are sampled and embedded by a model of 5 experts a layer that all differ."""
    words = MOE_TEXT.split()
    texts = [" ".join(words[row % 11 : row % 11 + 2 + row % 7]) for row in range(NUM_MOE_ROWS)]
    texts[5] = ""
    if not (folder / "rows.parquet").exists():
        pq.write_table(pa.table({"body": texts}), folder / "rows.parquet")
    return {
        "name": name,
        "model": str(model),
        "input": {"path": str(folder / "rows.parquet")},
        "prompt": {"column": "body", "chat": False},
        "generate": {"max_new_tokens": max_new_tokens, "temperature": 0.9, "seed": 4},
        "embed": {"of": "both"},
        "output": {"path": str(folder / name), "rows_per_split": 8},
        "engine": {"kv_cache_bytes": "4MiB", "max_sequences": 8} | (engine or {}),
        "cluster": {"threads": 1, "dtype": "float32", "device": "cpu"} | cluster,
    }


@pytest.fixture
def moe_job(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`moe_job(name, **cluster)`: see `moe_settings`."""

    def make(name: str, **options: Any) -> dict[str, Any]:
        return moe_settings(tiny_model("mixtral"), tmp_path, name, **options)

    return make


@pytest.fixture(scope="session")
def moe_alone(ray_cluster: str, tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The result of `moe_job` on one rank that nothing happens to."""
    from jobs.client import run

    folder = tmp_path_factory.mktemp("moe")
    return run(moe_settings(tiny_model("mixtral"), folder, "alone", expert_parallel=1))


@pytest.fixture(scope="session")
def moe_rows(moe_alone: Any) -> list[dict[str, Any]]:
    """Its rows."""
    rows = read_rows(moe_alone.out)
    assert len(rows) == NUM_MOE_ROWS
    assert len({row["text"] for row in rows}) > NUM_MOE_ROWS / 2
    return rows


@pytest.fixture
def begin_together(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`begin_together(2)`: jobs of this test lease no split until so many replicas ask for one, however late one is."""
    from jobs.leases import LeaseBook

    def set_up(num_replicas: int) -> None:
        grant, complete = LeaseBook.grant, set[LeaseBook]()

        def grant_once_all_ask(book: LeaseBook) -> list[Any]:
            if len({shard.replica for shard in book._shards}) == num_replicas:
                complete.add(book)
            return grant(book) if book in complete else []

        monkeypatch.setattr(LeaseBook, "grant", grant_once_all_ask)

    return set_up


@pytest.fixture
def run_job(ray_cluster: str) -> Callable[..., Any]:
    from jobs.client import run

    def start(settings: dict[str, Any], **options: Any) -> Any:
        return run(settings, **{"engine_factory": CHEAP} | options)

    return start


def read_rows(out: Path | str) -> list[dict[str, Any]]:
    parts = sorted(Path(out, "parts").glob("*.parquet"))
    return [row for part in parts for row in pq.read_table(part, partitioning=None).to_pylist()]


@pytest.fixture(scope="session")
def indexed_job(ray_cluster: str, tiny_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job of 60 rows that is done, whose index has three shards. Rows 17 and 41 have the same text."""
    from jobs.client import run

    folder = tmp_path_factory.mktemp("indexed")
    shutil.copytree(tiny_tokenizer_dir, folder / "model")
    (folder / "model" / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model" / "model.safetensors").write_bytes(b"weights")
    texts = [f"text number {17 if row == 41 else row}" for row in range(60)]
    pq.write_table(pa.table({"body": texts, "key": [f"key-{row}" for row in range(60)]}), folder / "rows.parquet")
    settings = {
        "model": str(folder / "model"),
        "input": {"path": str(folder / "rows.parquet"), "id": "key"},
        "prompt": {"column": "body"},
        "embed": {"pooling": "mean"},
        "index": {"kind": "Flat", "shards": 3},
        "output": {"path": str(folder / "out"), "rows_per_split": 16},
        "cluster": {"threads": 1},
    }
    return run(settings, engine_factory=CHEAP).out


@pytest.fixture
def rows_of() -> Callable[[Path | str], list[dict[str, Any]]]:
    """A job's directory -> all committed records, in order."""
    return read_rows


@pytest.fixture
def shards_of() -> Callable[[psutil.Process], list[psutil.Process]]:
    """A process -> the actors among what it started that hold decoder shards."""
    return partial(actors_of, "ShardActor")


class Controller:
    """A run in a process of its own, which may be killed with everything that it started."""

    def __init__(self, settings: dict[str, Any], *, address: str | None, before: str = "", **options: Any) -> None:
        lines = [
            "import os, signal, sys",
            "from jobs.client import JobInterrupted, run",
            before,
            "try:",
            f"    run({settings!r}, **{ {'engine_factory': CHEAP} | options!r})",
            "except JobInterrupted:",
            "    sys.exit(130)",
        ]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ENGINES)])}
        environment.pop("RAY_ADDRESS", None)
        if address is not None:
            environment |= {"RAY_ADDRESS": address, "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "token")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", "\n".join(lines)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def kill_tree(self) -> None:
        try:
            tree = [psutil.Process(self.process.pid)]
            tree += tree[0].children(recursive=True)
        except psutil.NoSuchProcess:
            tree = []
        for process in tree:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.communicate()

    def end(self, timeout_s: float = 180.0) -> tuple[int, str, str]:
        """Exit status, stdout and stderr."""
        try:
            out, err = self.process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.kill_tree()
            raise
        return self.process.returncode, out, err


@pytest.fixture
def controller() -> Iterator[Callable[..., Controller]]:
    """`controller(settings, address=None)`: the job in a process of its own; no address: with a Ray of its own."""
    begun: list[Controller] = []

    def begin(settings: dict[str, Any], **options: Any) -> Controller:
        begun.append(Controller(settings, **options))
        return begun[-1]

    yield begin
    for one in begun:
        if one.process.poll() is None:
            one.kill_tree()


@pytest.fixture(scope="session")
def biased_model(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """gpt-oss in small, of 8 experts, whose routers favour those that the first of two ranks is dealt."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("biased")
    shutil.copytree(tiny_model("gpt_oss", num_local_experts=8), folder, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if name.endswith("router.bias"):
            weights[name] = weights[name] + torch.tensor([3.0, 0.0, 3.0, 0.0, 1.5, 0.0, 1.5, 0.0])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def skewed_job(biased_model: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`skewed_job(name, **cluster)`: 64 rows that are continued and embedded."""
    words = MOE_TEXT.split()
    texts = [" ".join(words[row % 11 : row % 11 + 2 + row % 7]) for row in range(64)]
    pq.write_table(pa.table({"body": texts}), tmp_path / "skewed.parquet")

    def make(name: str, *, model: Path = biased_model, **cluster: Any) -> dict[str, Any]:
        settings = moe_settings(model, tmp_path, name, max_new_tokens=6, **cluster)
        return settings | {"input": {"path": str(tmp_path / "skewed.parquet")}}

    return make
