"""Whether every node that shards may run on sees what they need: this code, the model, the input, the output folder.

Looked at before the work starts, where there are other nodes than this one: a mount that is missing on one of fifty
would else be found by the shard that lands there, hours later. For the output it is not enough that a folder of that
name is there: this process writes a nonce that the node must read, and the node one that this process must read.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jobs.cluster.nodes import Node, ask_each, own_node_id
from pipeline.durable import storage_errors
from pipeline.errors import UserError, one_line
from pipeline.job_folder import JobFolder
from pipeline.locations import locate
from pipeline.model_path import model_files
from workers.settings import ShardSettings

ANSWER_S = 60.0  # for a node to start a process and look
SHARED_S = 5.0  # for a file to be seen through a shared filesystem's caches
MAX_INPUT_FILES = 32  # looked at on each node, of all over the input
SMALL_BYTES = 1 << 20  # files up to this size are compared by their bytes, larger ones by their size
CODE = ("*.py", "*.c", "*.h")


def refuse_blind_nodes(nodes: Sequence[Node], settings: ShardSettings) -> None:
    """UserError that names a node and what it doesn't see as this one does. One on this node alone costs nothing."""
    here = own_node_id()
    others = [node for node in nodes if node.id != here]
    if not others:
        return
    with _nonce(JobFolder(Path(settings.job.out))) as nonce:
        answers = ask_each(others, _asking(expected(settings, nonce)), ANSWER_S)
        for node in others:
            answer = answers.get(node.id, "")  # one that died meanwhile is no concern
            if isinstance(answer, Exception):
                answer = f"has not said whether it sees the job's files: {one_line(answer)}"
            elif not answer and node.id in answers:
                answer = _unread(nonce, node.id)
            if answer:
                raise UserError(f"{node} {answer}; {_mend(node)}")


def _mend(node: Node) -> str:
    return f'mend that, or leave the node out with cluster.labels: {{ray.io/node-id: "!{node.id}"}}'


def _asking(what: Mapping[str, Any]) -> Callable[[str], str]:
    """What runs on the node. It travels whole, so that it can tell where there is nothing to import."""

    def look_there(node_id: str) -> str:
        try:
            from jobs.cluster.visibility import look
        except ImportError as error:
            return f"can't import gristmill ({error}): install the same there as here"
        return look(what, node_id)

    return look_there


def expected(settings: ShardSettings, nonce: Path) -> dict[str, Any]:
    """What this node sees, to compare with: plain values."""
    files = settings.job.source["files"]
    step = max(1, -(-len(files) // MAX_INPUT_FILES))
    model = Path(settings.engine.model_path)
    return {
        "code": code_digest(),
        "model": {str(path): _mark(path) for path in model_files(model).values()},
        "input": {file["path"]: file["size_bytes"] for file in files[::step]},
        "nonce": str(nonce),
        "shared_s": SHARED_S,
        "content": nonce.read_text(),
    }


def look(what: Mapping[str, Any], node_id: str) -> str:
    """What of it is another on this machine, in words that follow the node's name; '' if nothing is.

    Leaves this node's own nonce beside the one it found.
    """
    if code_digest() != what["code"]:
        return "has another version of gristmill's code: install the same there as here"
    for name, mark in what["model"].items():
        try:
            found = _mark(Path(name))
        except OSError as error:
            return f"can't see the model: {name}: {error.strerror}"
        if found != mark:
            return f"has another model: {name} is not the file that it is here"
    for name, size in what["input"].items():
        try:
            place = locate(name)
            info = place.info()
        except (OSError, UserError) as error:
            return f"can't see the input: {one_line(error)}"
        if not info.is_file:
            return f"can't see the input: {name} is not there"
        if info.size != size:
            return f"has another input: {name} has {info.size} bytes there and {size} here"
    nonce = Path(what["nonce"])
    if not _appears(nonce, what["content"], what["shared_s"]):
        state = "another folder" if nonce.parent.is_dir() else "not"
        return f"doesn't share output.path: {nonce.parent} is {state} there, and must be the same folder on every node"
    try:
        _answer(nonce, node_id).write_text(what["content"])
    except OSError as error:
        return f"can't write to output.path: {nonce.parent}: {error.strerror}"
    return ""


def code_digest() -> str:
    """Of all of gristmill's source, wherever it lies."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for package in ("pipeline", "workers", "jobs"):
        for path in sorted(path for pattern in CODE for path in (root / package).rglob(pattern)):
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _mark(path: Path) -> str:
    """The bytes of a small file, the size of a large one."""
    size = path.stat().st_size
    return hashlib.sha256(path.read_bytes()).hexdigest() if size <= SMALL_BYTES else f"{size} bytes"


@contextmanager
def _nonce(folder: JobFolder) -> Iterator[Path]:
    path = folder.attempts / f"nonce-{secrets.token_hex(8)}"
    with storage_errors("writing", path):
        path.write_text(secrets.token_hex(16))
    try:
        yield path
    finally:
        for left in folder.attempts.glob(f"{path.name}*"):
            left.unlink(missing_ok=True)


def _answer(nonce: Path, node_id: str) -> Path:
    return nonce.with_name(f"{nonce.name}.{node_id}")


def _unread(nonce: Path, node_id: str) -> str:
    if _appears(_answer(nonce, node_id), nonce.read_text(), SHARED_S):
        return ""
    return f"doesn't share output.path: what it writes to {nonce.parent} is not seen here"


def _appears(path: Path, content: str, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while True:
        try:
            if path.read_text() == content:
                return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
