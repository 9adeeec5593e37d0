"""The demo's corpus: the Python language reference that every Python carries, cut into passages.

`python examples/demo/corpus.py FILE.parquet` writes the columns `topic` (the key in `pydoc_data.topics`), `title` (the
headings above the passage) and `passage`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

MIN_PASSAGE_CHARS = 750

_UNDERLINE = re.compile(r"([*=\-~\"^])\1{2,}")


class Passage(NamedTuple):
    topic: str
    title: str
    text: str


def paragraphs(document: str) -> Iterator[tuple[str, str]]:
    """(title, paragraph) in order. The title joins the document's heading and the section's, where they differ."""
    headings: dict[str, str] = {}  # underline character -> heading in force, outermost first
    for block in re.split(r"\n\s*\n", document.strip("\n")):
        lines = block.splitlines()
        if len(lines) >= 2 and _UNDERLINE.fullmatch(lines[1].strip()):
            level = lines[1].strip()[0]
            known = list(headings)
            if level in known:
                for deeper in known[known.index(level) :]:
                    del headings[deeper]
            headings[level] = lines[0].strip()
            lines = lines[2:]
        text = "\n".join(lines).strip("\n")
        if text.strip():
            names = list(dict.fromkeys(headings.values()))
            yield ": ".join([names[0], names[-1]] if len(names) > 1 else names), text


def passages() -> list[Passage]:
    """Every paragraph once, run together until a passage has MIN_PASSAGE_CHARS; none reaches over a heading.

    Large topics repeat small ones whole. The small one keeps the text, so that `for` is found under "for".
    """
    seen: set[str] = set()
    found: list[Passage] = []
    for topic in sorted(topics, key=lambda name: (len(topics[name]), name)):
        title, texts = "", list[str]()
        for next_title, text in [*paragraphs(topics[topic]), ("", "")]:
            if texts and (next_title != title or sum(map(len, texts)) >= MIN_PASSAGE_CHARS):
                found.append(Passage(topic, title, "\n\n".join(texts)))
                texts = []
            title = next_title
            fingerprint = " ".join(text.split())
            if fingerprint and fingerprint not in seen:
                seen.add(fingerprint)
                texts.append(text)
    return sorted(found, key=lambda passage: passage.topic)  # stable: in order within a topic


def write(path: Path) -> int:
    """Write the corpus whole or not at all; the number of passages."""
    found = passages()
    columns = {name: [getattr(p, field) for p in found] for name, field in _COLUMNS.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    pq.write_table(pa.table(columns), unfinished)
    unfinished.replace(path)
    return len(found)


_COLUMNS = {"topic": "topic", "title": "title", "passage": "text"}


if __name__ == "__main__":
    print(f"{write(Path(sys.argv[1]))} passages")
