"""Rows come in any order; the part has each once, in the order of the input, as a slow, obvious reference has it."""

from __future__ import annotations

import hashlib
import itertools
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.attempt import Attempt, records_to_keep
from pipeline.errors import JobError, RowError, UserError
from pipeline.job_folder import JobFolder
from pipeline.parts import PartBuilder
from pipeline.records import RecordLayout, carried_names, embedded_fields, part_schema

CONTRACT = [
    ("row", pa.int64()),
    ("id", pa.string()),
    ("sample", pa.int32()),
    ("text", pa.string()),
    ("finish_reason", pa.string()),
    ("prompt_tokens", pa.int32()),
    ("completion_tokens", pa.int32()),
    ("logprobs", pa.list_(pa.float32())),
]
ERRORS = [("error_code", pa.string()), ("error_message", pa.string())]


@pytest.fixture
def folder(tmp_path: Path) -> JobFolder:
    folder = JobFolder(tmp_path / "out")
    folder.create()
    return folder


def written(folder: JobFolder, attempt: Attempt) -> pa.Table:
    return pq.read_table(folder.root / attempt.path)


def add(builder: PartBuilder, row: int, *, sample: int = 0, text: str | None = None) -> None:
    builder.add(
        row,
        sample=sample,
        text=f"answer {row}.{sample}" if text is None else text,
        finish_reason="stop",
        prompt_tokens=row,
        completion_tokens=sample + 1,
    )


@pytest.mark.parametrize(
    ("embeds", "vectors"),
    [
        (None, [("embedding", pa.list_(pa.float32(), 0))]),
        ("prompt", [("embedding", pa.list_(pa.float32(), 3))]),
        ("generation", [("embedding", pa.list_(pa.float32(), 3))]),
        ("both", [(name, pa.list_(pa.float32(), 3)) for name in ("prompt_embedding", "generation_embedding")]),
    ],
)
def test_a_part_has_the_contracts_columns_types_and_order(embeds: Any, vectors: Any) -> None:
    schema = part_schema(embeds=embeds, dimension=3, carried=pa.schema([("title", pa.large_string())]))
    assert [(field.name, field.type) for field in schema] == [
        *CONTRACT,
        *vectors,
        *ERRORS,
        ("title", pa.large_string()),
    ]


def test_the_schema_says_what_its_vectors_embed_also_after_parquet(tmp_path: Path) -> None:
    schema = part_schema(embeds="both", dimension=2, carried=pa.schema([]))
    pq.write_table(schema.empty_table(), tmp_path / "empty.parquet")
    expected = {"prompt_embedding": "prompt", "generation_embedding": "generation"}
    assert embedded_fields(pq.read_schema(tmp_path / "empty.parquet")) == expected
    assert embedded_fields(part_schema(embeds=None, dimension=None, carried=pa.schema([]))) == {}


def test_carried_columns_never_hide_the_parts_own() -> None:
    assert carried_names(["text", "input_text", "row", "title"]) == {
        "text": "input_input_text",
        "input_text": "input_text",
        "row": "input_row",
        "title": "title",
    }


def test_a_column_that_parquet_cannot_hold_is_refused_by_name() -> None:
    union = pa.dense_union([pa.field("a", pa.int32())])
    with pytest.raises(UserError, match="'odd'"):
        RecordLayout.of(samples=1, embeds=None, carried=pa.schema([("odd", union)]))
    with pytest.raises(UserError, match="'nested'"):
        RecordLayout.of(samples=1, embeds=None, id_column=pa.field("nested", pa.list_(pa.int8())))


def test_rows_that_finish_in_any_order_are_written_in_the_order_of_the_input(folder: JobFolder) -> None:
    layout = RecordLayout.of(samples=2, embeds=None, carried=pa.schema([("title", pa.string())]))
    builder = PartBuilder(layout, split=4, first_row=10, num_rows=3)
    builder.carry(8, pa.record_batch({"title": ["no", "no", "ten", "eleven"]}))
    builder.carry(12, pa.record_batch({"title": ["twelve", "no"]}))
    for row, sample in [(12, 1), (10, 0), (12, 0), (10, 1)]:
        add(builder, row, sample=sample)
    assert not builder.is_complete
    assert builder.needs(11)
    add(builder, 11, sample=1)
    builder.fail(11, RowError("prompt_too_long", "900 tokens"))
    add(builder, 11, sample=0)  # comes late and is dropped
    assert builder.is_complete
    attempt = builder.write(folder)
    assert written(folder, attempt).select(["row", "sample", "text", "error_code", "title", "id"]).to_pylist() == [
        {"row": 10, "sample": 0, "text": "answer 10.0", "error_code": None, "title": "ten", "id": "10"},
        {"row": 10, "sample": 1, "text": "answer 10.1", "error_code": None, "title": "ten", "id": "10"},
        {"row": 11, "sample": 0, "text": None, "error_code": "prompt_too_long", "title": "eleven", "id": "11"},
        {"row": 12, "sample": 0, "text": "answer 12.0", "error_code": None, "title": "twelve", "id": "12"},
        {"row": 12, "sample": 1, "text": "answer 12.1", "error_code": None, "title": "twelve", "id": "12"},
    ]
    assert (attempt.rows, attempt.records, attempt.errors) == (3, 5, 1)
    assert attempt.error_codes == {"prompt_too_long": 1}
    assert (attempt.prompt_tokens, attempt.completion_tokens) == (22, 6)


def test_the_attempt_says_the_files_hash_and_survives_json(folder: JobFolder) -> None:
    builder = PartBuilder(RecordLayout.of(samples=1, embeds=None), split=0, first_row=0, num_rows=1)
    add(builder, 0)
    attempt = builder.write(folder)
    content = (folder.root / attempt.path).read_bytes()
    assert (attempt.sha256, attempt.size_bytes) == (hashlib.sha256(content).hexdigest(), len(content))
    assert Attempt.from_json(attempt.to_json()) == attempt


def test_two_attempts_at_one_split_never_share_a_name(folder: JobFolder) -> None:
    paths = set()
    for _ in range(3):
        builder = PartBuilder(RecordLayout.of(samples=1, embeds=None), split=0, first_row=0, num_rows=1)
        add(builder, 0)
        paths.add(builder.write(folder).path)
    assert len(paths) == 3


@pytest.mark.parametrize("flaw", [np.nan, np.inf, -np.inf, 0.0])
def test_a_vector_that_cannot_be_searched_for_makes_its_row_an_error(folder: JobFolder, flaw: float) -> None:
    builder = PartBuilder(RecordLayout.of(samples=0, embeds="prompt", dimension=3), split=0, first_row=0, num_rows=3)
    for row in range(3):
        vector = np.array([0.0, 0.0, flaw if row == 1 else 1.0], np.float32)
        builder.add_vector(row, "prompt", vector, prompt_tokens=7)
    attempt = builder.write(folder)
    table = written(folder, attempt)
    assert table["error_code"].to_pylist() == [None, "nonfinite", None]
    assert table["embedding"].to_pylist() == [[0, 0, 1], None, [0, 0, 1]]
    assert table["prompt_tokens"].to_pylist() == [7, None, 7]
    assert attempt.vectors == {"prompt": 2}


def test_a_prompts_vector_stands_in_every_sample_and_counts_once(folder: JobFolder) -> None:
    layout = RecordLayout.of(samples=2, embeds="both", dimension=2)
    builder = PartBuilder(layout, split=0, first_row=0, num_rows=2)
    for row in (1, 0):
        builder.add_vector(row, "prompt", np.array([row, 1], np.float32))
        for sample in (1, 0):
            add(builder, row, sample=sample)
            builder.add_vector(row, "generation", np.array([row, 2 + sample], np.float32), sample=sample)
    attempt = builder.write(folder)
    table = written(folder, attempt)
    assert table["prompt_embedding"].to_pylist() == [[0, 1], [0, 1], [1, 1], [1, 1]]
    assert table["generation_embedding"].to_pylist() == [[0, 2], [0, 3], [1, 2], [1, 3]]
    assert attempt.vectors == {"prompt": 2, "generation": 4}


def test_text_that_arrow_cannot_hold_fails_its_row_alone(folder: JobFolder) -> None:
    builder = PartBuilder(RecordLayout.of(samples=1, embeds=None), split=0, first_row=0, num_rows=3)
    add(builder, 0, text="fine")
    add(builder, 1, text="half \ud83d")
    builder.fail(2, RowError("template_error", "near \udc00"))
    table = written(folder, builder.write(folder))
    assert table["text"].to_pylist() == ["fine", None, None]
    assert table["error_code"].to_pylist() == [None, "internal", "template_error"]
    assert table["error_message"][2].as_py() == "near ?"


def test_ids_become_text_whatever_their_type(folder: JobFolder) -> None:
    dictionary = pa.array(["a", None, "b"]).dictionary_encode()
    binary = pa.array([b"a", None, b"\xff"])
    for ids, expected in [
        (pa.array([7, None, 9]), ["7", None, "9"]),
        (dictionary, ["a", None, "b"]),
        (binary, ["a", None, "�"]),
    ]:
        layout = RecordLayout.of(samples=1, embeds=None, id_column=pa.field("key", ids.type))
        builder = PartBuilder(layout, split=0, first_row=0, num_rows=3)
        builder.carry(0, pa.record_batch({"key": ids, "unused": [1, 2, 3]}))
        for row in range(3):
            add(builder, row)
        assert written(folder, builder.write(folder))["id"].to_pylist() == expected


def test_carried_columns_keep_their_types_and_values(folder: JobFolder) -> None:
    columns: dict[str, pa.Array[Any]] = {
        "when": pa.array([1, 2], pa.timestamp("us", "UTC")),
        "words": pa.array([["a"], None], pa.list_(pa.string())),
        "nested": pa.array([{"k": 1}, None], pa.struct([("k", pa.int32())])),
        "kind": pa.array(["x", "y"]).dictionary_encode(),
        "runs": pc.run_end_encode(pa.array(["x", "x"])),
        "view": pa.array(["x", None], pa.string_view()),
        "long": pa.array(["x", "y"], pa.large_string()),
        "text": pa.array(["input", "texts"]),
    }
    batch = pa.record_batch(columns)
    layout = RecordLayout.of(samples=1, embeds=None, carried=batch.schema)
    builder = PartBuilder(pickle.loads(pickle.dumps(layout)), split=0, first_row=0, num_rows=2)
    builder.carry(0, batch)
    add(builder, 0)
    add(builder, 1)
    table = written(folder, builder.write(folder))
    assert table.schema == layout.schema
    for name in columns:
        target = "input_text" if name == "text" else name
        assert table[target].to_pylist() == batch[name].to_pylist()


def test_a_later_revision_takes_over_what_was_finished_and_fills_in_the_rest(folder: JobFolder) -> None:
    layout = RecordLayout.of(samples=2, embeds="prompt", dimension=1, carried=pa.schema([("title", pa.string())]))
    batch = pa.record_batch({"title": list("abcde")})
    first = PartBuilder(layout, split=0, first_row=0, num_rows=4)
    first.carry(0, batch)
    for row in (0, 2, 3):
        add(first, row, sample=0)
        add(first, row, sample=1)
        first.add_vector(row, "prompt", np.array([1.0], np.float32))
    first.fail(1, RowError("internal", "try again"))
    earlier = first.write(folder)

    kept = records_to_keep(folder.root / earlier.path, earlier.sha256, retry_errors=True)
    second = PartBuilder(layout, split=0, first_row=0, num_rows=5, revision=1, kept=kept)
    assert [row for row in range(5) if second.needs(row)] == [1, 4]
    second.carry(0, batch)
    for row in (4, 1):
        second.add_vector(row, "prompt", np.array([2.0], np.float32))
        add(second, row, sample=1, text="new")
        add(second, row, sample=0, text="new")
    later = second.write(folder)
    table = written(folder, later)
    assert table["row"].to_pylist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert table["sample"].to_pylist() == [0, 1] * 5
    assert [text == "new" for text in table["text"].to_pylist()] == [row in (1, 4) for row in table["row"].to_pylist()]
    assert table["embedding"].to_pylist() == [[2.0] if row in (1, 4) else [1.0] for row in table["row"].to_pylist()]
    assert table["title"].to_pylist() == list("aabbccddee")
    assert (later.revision, later.rows, later.errors, later.vectors) == (1, 5, 0, {"prompt": 5})


def test_a_prompts_vector_stays_with_its_row_where_records_happen_to_be_as_many_as_rows(folder: JobFolder) -> None:
    """Two of four rows are kept, and the other two have two records each."""
    layout = RecordLayout.of(samples=2, embeds="prompt", dimension=1)
    kept = None
    for revision, rows in enumerate([range(4), (1, 3)]):
        builder = PartBuilder(layout, split=0, first_row=0, num_rows=4, revision=revision, kept=kept)
        for row in rows:
            builder.add_vector(row, "prompt", np.array([row + 1], np.float32))
            add(builder, row, sample=0)
            add(builder, row, sample=1)
        table = written(folder, builder.write(folder))
        assert table["embedding"].to_pylist() == [[1], [1], [2], [2], [3], [3], [4], [4]]
        kept = table.filter(pa.array([True, True, False, False] * 2))


def test_a_damaged_part_is_not_taken_over(folder: JobFolder) -> None:
    builder = PartBuilder(RecordLayout.of(samples=1, embeds=None), split=0, first_row=0, num_rows=1)
    add(builder, 0)
    attempt = builder.write(folder)
    (folder.root / attempt.path).write_bytes(b"PAR1")
    with pytest.raises(JobError, match="damaged"):
        records_to_keep(folder.root / attempt.path, attempt.sha256, retry_errors=False)


def test_a_part_that_cannot_be_written_is_one_line_and_leaves_nothing(folder: JobFolder, monkeypatch: Any) -> None:
    builder = PartBuilder(RecordLayout.of(samples=1, embeds=None), split=0, first_row=0, num_rows=1)
    add(builder, 0)

    def full(handle: int, content: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.write", full)
    with pytest.raises(JobError, match=r"no space left; free some and run again") as caught:
        builder.write(folder)
    assert "\n" not in str(caught.value)
    assert list(folder.attempts.iterdir()) == []


@dataclass(frozen=True, slots=True)
class Events:
    """What happens to the rows of a part, in an order that hypothesis chose. A piece is (kind, row, sample)."""

    layout: RecordLayout
    num_rows: int
    pieces: list[tuple[str, int, int]]  # kinds: text, prompt, generation, fail (takes the place of another piece)
    nonfinite: set[int]
    kept: set[int]
    cuts: set[int]  # where read batches end


@st.composite
def events(draw: st.DrawFn) -> Events:
    embeds = draw(st.sampled_from([None, "prompt", "generation", "both"]))
    samples = draw(st.integers(0 if embeds == "prompt" else 1, 3))
    num_rows = draw(st.integers(1, 8))
    some_rows = st.sets(st.integers(0, num_rows - 1))
    kinds = [("text", samples)] if samples else []
    kinds += [("prompt", 1)] if embeds in ("prompt", "both") else []
    kinds += [("generation", samples)] if embeds in ("generation", "both") else []
    kept = draw(some_rows)
    failed = draw(some_rows) - kept
    pieces = []
    for row in set(range(num_rows)) - kept:
        own = draw(st.permutations([(kind, row, sample) for kind, count in kinds for sample in range(count)]))
        pieces += [("fail", row, 0), *own[1:]] if row in failed else own
    return Events(
        layout=RecordLayout.of(
            samples=samples,
            embeds=embeds,
            dimension=2,
            carried=pa.schema([("text", pa.string())]),
            id_column=pa.field("text", pa.string()) if draw(st.booleans()) else None,
        ),
        num_rows=num_rows,
        pieces=draw(st.permutations(pieces)),
        nonfinite=draw(some_rows) - kept - failed if embeds else set(),
        kept=kept,
        cuts=draw(some_rows),
    )


@settings(max_examples=80, deadline=None)
@given(events())
def test_a_part_equals_a_slow_obvious_reference(tmp_path_factory: pytest.TempPathFactory, case: Events) -> None:
    folder = JobFolder(tmp_path_factory.mktemp("job"))
    folder.create()
    kept = pa.Table.from_pylist(
        [record for row in sorted(case.kept) for record in records_of(case, row)], case.layout.schema
    )
    builder = PartBuilder(case.layout, split=0, first_row=100, num_rows=case.num_rows, kept=kept if case.kept else None)
    cuts = [0, *sorted(case.cuts), case.num_rows]
    for start, stop in itertools.pairwise(cuts):
        builder.carry(100 + start, pa.record_batch({"text": [f"in {row}" for row in range(start, stop)]}))
    for kind, row, sample in case.pieces:
        if kind == "fail":
            builder.fail(100 + row, RowError("internal", "no"))
        elif kind == "text":
            add(builder, 100 + row, sample=sample)
        else:
            vector = np.array([np.nan if row in case.nonfinite else row, 1 + sample], np.float32)
            builder.add_vector(100 + row, kind, vector, sample=sample, prompt_tokens=100 + row)
    attempt = builder.write(folder)
    expected = [record for row in range(case.num_rows) for record in records_of(case, row)]
    assert written(folder, attempt).drop_columns(["error_message"]).to_pylist() == expected
    assert attempt.records == len(expected)
    assert attempt.errors == sum(record["error_code"] is not None for record in expected)
    for field, column in case.layout.vectors.items():
        counted = [r for r in expected if r[column] is not None and (field == "generation" or r["sample"] == 0)]
        assert attempt.vectors[field] == len(counted)


def records_of(case: Events, row: int) -> list[dict[str, Any]]:
    empty = dict.fromkeys(name for name in case.layout.schema.names if name != "error_message")
    key = {"row": 100 + row, "id": f"in {row}" if case.layout.id_column else str(100 + row), "input_text": f"in {row}"}
    if ("fail", row, 0) in case.pieces:
        return [{**empty, **key, "sample": 0, "error_code": "internal"}]
    if row in case.nonfinite:
        return [{**empty, **key, "sample": 0, "error_code": "nonfinite"}]
    records = []
    for sample in range(max(case.layout.samples, 1)):
        record = {**empty, **key, "sample": sample, "prompt_tokens": 100 + row}
        if case.layout.samples:
            text = {"text": f"answer {100 + row}.{sample}", "finish_reason": "stop", "completion_tokens": sample + 1}
            record |= text
        for field, column in case.layout.vectors.items():
            record[column] = [float(row), 1.0 + (sample if field == "generation" else 0)]
        records.append(record)
    return records


def test_a_part_whose_rows_all_failed_has_null_vectors(folder: JobFolder) -> None:
    builder = PartBuilder(RecordLayout.of(samples=3, embeds="both", dimension=2), split=0, first_row=0, num_rows=4)
    for row in range(4):
        builder.fail(row, RowError("empty_prompt", "nothing"))
    attempt = builder.write(folder)
    table = written(folder, attempt)
    assert table["generation_embedding"].null_count == table.num_rows == attempt.errors == 4
    assert attempt.vectors == {"prompt": 0, "generation": 0}
