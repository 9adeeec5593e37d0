"""The demo's corpus is the whole language reference, once, and its job file is one that a reader can run and change."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType

import pyarrow.parquet as pq
import pytest

from jobs.specfile import load_spec

DEMO = Path(__file__).parents[2] / "examples" / "demo"


@pytest.fixture(scope="module")
def corpus() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_corpus", DEMO / "corpus.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def test_the_corpus_has_at_least_400_passages_with_a_title_each(corpus: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "corpus.parquet"
    number = corpus.write(path)
    table = pq.read_table(path)
    assert number == table.num_rows >= 400
    assert table.column_names == ["topic", "title", "passage"]
    assert all(value.strip() for name in table.column_names for value in table[name].to_pylist())
    assert set(table["topic"].to_pylist()) <= set(topics)


def test_every_paragraph_of_every_topic_is_in_the_corpus_once(corpus: ModuleType) -> None:
    seen = [
        " ".join(block.split())
        for passage in corpus.passages()
        for block in re.split(r"\n\s*\n", passage.text.strip("\n"))
    ]
    assert len(seen) == len(set(seen))
    paragraphs = {" ".join(text.split()) for topic in topics.values() for _, text in corpus.paragraphs(topic)}
    assert set(seen) == paragraphs


def test_a_title_names_the_document_and_the_section(corpus: ModuleType) -> None:
    document = "Outer\n*****\n\nOne.\n\nInner\n=====\n\nTwo.\n\nDeeper\n------\n\nThree.\n\nNext\n====\n\nFour."
    assert list(corpus.paragraphs(document)) == [
        ("Outer", "One."),
        ("Outer: Inner", "Two."),
        ("Outer: Deeper", "Three."),
        ("Outer: Next", "Four."),
    ]


def test_the_job_file_is_valid_and_names_what_the_demo_makes(corpus: ModuleType) -> None:
    spec = load_spec(DEMO / "job.yaml")
    assert spec.model == "out/demo/model"
    assert spec.input.path == "out/demo/corpus.parquet"
    assert spec.output.columns == ("topic", "title", "passage")
    assert spec.embed is not None
    assert spec.index is not None
