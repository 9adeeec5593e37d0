"""`gristmill tokenizer train`: what it writes, and what it says when it can't."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from pipeline.errors import JobError, RowError, UserError
from pipeline.tokenizer import load_tokenizer
from pipeline.tokenizers.corpus import corpus_texts
from pipeline.tokenizers.training import train_tokenizer

TEXT = ["the quick brown fox jumps over the lazy dog " * 3, "  def f(x):\n        return x\n", "Größe, naïve"] * 20


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_any_text_survives_a_trained_vocabulary(kind: str, tmp_path: Path, hard_texts: list[str]) -> None:
    report = train_tokenizer(hard_texts[-12:], tmp_path / "new", kind, 800)
    assert (report.vocab_size, report.num_texts, report.num_skipped) == (800, 12, 0)
    tokenizer = load_tokenizer(tmp_path / "new")
    assert tokenizer.vocab_size == 800
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, {2})
    for text in hard_texts:
        if "▁" not in text:
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_transformers_loads_what_was_trained_and_gives_the_same_ids(tmp_path: Path, hard_texts: list[str]) -> None:
    train_tokenizer(hard_texts[-12:], tmp_path, "bpe", 800)
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in hard_texts:
        assert ours.encode(text, parse_special=True) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text), skip_special_tokens=True)


def test_transformers_cuts_with_a_trained_unigram_vocabulary_into_equally_likely_pieces(
    tmp_path: Path, hard_texts: list[str]
) -> None:
    train_tokenizer(hard_texts[-12:], tmp_path, "unigram", 800)
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    pieces = SentencePieceProcessor.from_file(str(tmp_path / "tokenizer.model"))
    for text in hard_texts:
        if "<0x" in text:  # which transformers takes for bytes
            continue
        mine, other = ours.encode(text, parse_special=True), theirs.encode(text)
        assert sorted(mine) == sorted(other)
        likelihoods = [sum(map(pieces.get_score, ids)) for ids in (mine, other)]
        assert mine == other or likelihoods[0] == pytest.approx(likelihoods[1])


def test_training_twice_gives_the_same(tmp_path: Path) -> None:
    for name in ("one", "two"):
        train_tokenizer(iter(TEXT), tmp_path / name, "unigram", 295)
    assert load_tokenizer(tmp_path / "one").digest == load_tokenizer(tmp_path / "two").digest


def test_long_lines_are_learned_from_too(tmp_path: Path) -> None:
    train_tokenizer(["extraordinary " * 3000, "y" * 9000], tmp_path, "bpe", 285)
    assert len(load_tokenizer(tmp_path).encode(" extraordinary", add_special_tokens=False)) < 4


def test_rows_that_are_no_text_are_passed_over_and_counted(tmp_path: Path) -> None:
    report = train_tokenizer([*TEXT, "\ud800", None, 7], tmp_path, "bpe", 320)  # type: ignore[list-item]
    assert (report.num_texts, report.num_skipped) == (63, 3)


@pytest.mark.parametrize(
    ("corpus", "kind", "vocab_size", "said"),
    [
        (TEXT, "bpe", 100_000, r"--vocab-size 100000: too large for this corpus, which gives at most \d+ tokens"),
        (TEXT, "unigram", 100_000, r"--vocab-size 100000: too large for this corpus, which gives at most \d+ tokens"),
        (TEXT, "bpe", 100, r"--vocab-size 100: too small: .* take \d\d\d$"),
        (TEXT, "bpe", 0, "--vocab-size 0: must be between"),
        (TEXT, "wordpiece", 100, "--kind wordpiece: must be one of bpe, unigram"),
        ([], "bpe", 300, r"no text to learn from \(0 texts, 0 skipped\)"),
        (["", " \n", None], "bpe", 300, r"no text to learn from \(3 texts, 1 skipped\)"),
    ],
)
def test_what_cannot_be_trained_is_refused_with_one_line(
    corpus: list[str], kind: str, vocab_size: int, said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said) as refusal:
        train_tokenizer(corpus, tmp_path / "new", kind, vocab_size)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "new").exists()


def test_the_size_that_a_refusal_names_is_one_that_works(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at most") as refusal:
        train_tokenizer(TEXT, tmp_path / "new", "bpe", 100_000)
    train_tokenizer(TEXT, tmp_path / "new", "bpe", int(str(refusal.value).split("at most ")[1].split()[0]))


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    for taken in (tmp_path, tmp_path / "precious"):
        with pytest.raises(UserError, match="is there already"):
            train_tokenizer(TEXT, taken, "bpe", 320)


def test_what_the_corpus_raises_comes_through(tmp_path: Path) -> None:
    def corpus() -> Iterator[str]:
        yield "text"
        raise JobError("the bucket went away")

    with pytest.raises(JobError, match="the bucket went away"):
        train_tokenizer(corpus(), tmp_path, "bpe", 320)


def test_a_corpus_is_any_input_that_a_job_can_read(tmp_path: Path) -> None:
    records = [{"id": 1, "text": TEXT[0]}, {"id": 2, "text": None}, {"id": 3, "text": TEXT[1]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + "not json\n")
    (tmp_path / "page.txt").write_text(TEXT[2])
    texts = list(corpus_texts(str(tmp_path / "rows.jsonl")))
    assert [text for text in texts if isinstance(text, str)] == [TEXT[0], TEXT[1]]
    assert [error.code for error in texts if isinstance(error, RowError)] == ["malformed_record"]
    assert list(corpus_texts(str(tmp_path / "page.txt"))) == [TEXT[2]]
    report = train_tokenizer(corpus_texts(str(tmp_path / "rows.jsonl")), tmp_path / "new", "bpe", 290)
    assert (report.num_texts, report.num_skipped) == (4, 2)


def test_a_file_of_no_known_format_is_plain_text(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\ny = 2\n")
    (tmp_path / "b.py").write_text("z = 3\n")
    assert list(corpus_texts(str(tmp_path / "a.py"))) == ["x = 1", "y = 2"]
    assert list(corpus_texts(str(tmp_path / "*.py"))) == ["x = 1", "y = 2", "z = 3"]


def test_of_several_text_columns_text_is_read_or_else_all_are(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", "b"], "title": ["x", "y"]}), tmp_path / "titled.parquet")
    pq.write_table(pa.table({"body": ["a", "b"], "title": ["x", "y"]}), tmp_path / "both.parquet")
    pq.write_table(pa.table({"number": [1, 2]}), tmp_path / "numbers.parquet")
    assert list(corpus_texts(str(tmp_path / "titled.parquet"))) == ["a", "b"]
    assert sorted(map(str, corpus_texts(str(tmp_path / "both.parquet")))) == ["a", "b", "x", "y"]
    with pytest.raises(UserError, match="has no text column"):
        train_tokenizer(corpus_texts(str(tmp_path / "numbers.parquet")), tmp_path / "new", "bpe", 290)


def test_a_corpus_that_is_not_there_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        train_tokenizer(corpus_texts(str(tmp_path / "nowhere.txt")), tmp_path / "new", "bpe", 290)
