"""Compile the C files beside this one into a shared library, once a machine and source, and load it.

The library is cached under $XDG_CACHE_HOME/gristmill (by default ~/.cache/gristmill) by a hash of the sources, the
compiler, its flags and the processor's features, so that a home directory shared by unlike machines holds one for each.
It is built under a name of its own and renamed, so that processes which start together don't read half a file.

OpenMP's threads are torch's own: the library is linked against the runtime that torch has loaded. With a second runtime
two pools of threads would spin against each other.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

SOURCES = ("matmul.c", "attention.c", "elementwise.c")
HEADERS = ("vector.h",)
FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-Wall", "-Wno-unknown-pragmas", "-Wno-psabi")


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """The loaded library, or why there is none: the reason is one line that `gristmill plan` shows."""

    library: ctypes.CDLL | None
    reason: str | None


@functools.cache
def load() -> Built:
    """The kernels, built now if they were not before. GRISTMILL_KERNELS=0 leaves them out."""
    if os.environ.get("GRISTMILL_KERNELS", "1") == "0":
        return Built(library=None, reason="GRISTMILL_KERNELS=0")
    compiler = os.environ.get("CC") or next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
    if compiler is None:
        return Built(library=None, reason="no C compiler found (cc, gcc or clang on the path, or $CC)")
    runtime = _openmp_runtime()
    if runtime is None:
        return Built(library=None, reason="torch has loaded no OpenMP runtime to share")
    try:
        return Built(library=ctypes.CDLL(str(_compiled(compiler, runtime))), reason=None)
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        return Built(library=None, reason=f"{compiler} could not build the kernels: {detail.strip().splitlines()[0]}")


def _compiled(compiler: str, runtime: Path) -> Path:
    folder = Path(__file__).parent
    machine_flag = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    command = [*compiler.split(), *FLAGS, machine_flag, "-fopenmp", *(str(folder / name) for name in SOURCES)]
    version = subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True, check=True, timeout=60)
    parts = [version.stdout, *FLAGS, machine_flag, str(runtime), _processor()]
    parts += [(folder / name).read_text() for name in (*SOURCES, *HEADERS)]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gristmill"
    target = cache / f"kernels-{key}.so"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            built = Path(scratch) / "kernels.so"
            # The runtime by its path: it answers the compiler's calls before the linker looks for one of its own.
            subprocess.run(
                [*command, str(runtime), "-o", str(built), "-lm"],
                capture_output=True,
                text=True,
                check=True,
                timeout=300,
            )
            os.replace(built, target)
    return target


def _openmp_runtime() -> Path | None:
    """The OpenMP library that torch brought into this process."""
    for folder in (Path(torch.__file__).parent / "lib", Path(torch.__file__).parent.parent / "torch.libs"):
        for pattern in ("libgomp*", "libiomp5*", "libomp*"):
            for path in sorted(folder.glob(pattern)):
                return path
    return None


def _processor() -> str:
    """What the compiler's `native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
