"""`python -m benchmarks`: all of them, one after the other. Leave the machine alone meanwhile; it takes a while."""

from __future__ import annotations

import subprocess
import sys

for name in (
    "startup",
    "rows",
    "generation",
    "embedding",
    "int8",
    "placement",
    "expert_parallel",
    "retrieval",
    "index",
    "serving",
):
    print(f"== {name}", flush=True)
    subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)
