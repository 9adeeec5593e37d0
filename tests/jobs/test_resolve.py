"""What a job speaks of: settled where it exists, refused in one line where it does not, with nothing written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.output_path import refuse_output_in_input
from jobs.planned_index import refuse_unbuildable
from jobs.resolve import resolve
from jobs.specfile import parse_spec
from jobs.store import differences, open_store
from pipeline.errors import JobError, RowError, UserError
from pipeline.parts import PartBuilder
from pipeline.records import RecordLayout

TEXTS = ["one", "two", "three"]


def test_what_is_left_open_is_settled_by_model_and_input(job):
    settings = job(TEXTS, prompt={"template": "{{ title }}: {{ body }}"}, embed={"template": "{{ body }}"})
    settings["output"].pop("rows_per_split")
    resolved = resolve(parse_spec(settings))
    assert resolved.spec.output.columns == ("body", "title")
    assert resolved.spec.output.rows_per_split == 64
    assert resolved.spec.embed.pooling == "mean"
    assert [split.num_rows for split in resolved.splits] == [3]


def test_the_only_text_column_is_the_prompt(job, tmp_path):
    settings = job(TEXTS, prompt={})
    with pytest.raises(UserError, match=r"2 text columns \(body, title\): say prompt\.column"):
        resolve(parse_spec(settings))
    pq.write_table(pa.table({"n": [1, 2], "question": TEXTS[:2]}), tmp_path / "rows.parquet")
    resolved = resolve(parse_spec(settings))
    assert resolved.spec.prompt.column == "question"
    assert resolved.spec.output.columns == ("question",)


def test_a_settled_job_is_the_same_job_as_one_that_says_it_all(job):
    open_spec = parse_spec(job(TEXTS))
    settled = resolve(open_spec)
    assert resolve(settled.spec).fingerprint == settled.fingerprint


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"prompt": {"column": "bdy"}}, "no column 'bdy'; did you mean 'body'"),
        ({"prompt": {"template": "{{ bdy }}"}}, "prompt.template: input has no column 'bdy'"),
        ({"embed": {"template": "{{ bdy }}"}}, "embed.template: input has no column 'bdy'"),
        ({"prompt": {"template": "{{ body"}}, "prompt.template, line 1"),
        ({"output": {"path": "out", "columns": ["titel"]}}, "no column 'titel'; did you mean 'title'"),
        ({"input": {"path": "nowhere/*.parquet"}}, "nowhere/*.parquet: no file matches"),
        ({"model": "nowhere"}, "model: nowhere: no such file or folder"),
    ],
)
def test_what_does_not_exist_is_refused_in_one_line_and_nothing_is_written(job, changes, expected, tmp_path):
    settings = job(TEXTS)
    spec = parse_spec(settings | changes)
    with pytest.raises(UserError) as caught, open_store(spec):
        pytest.fail("the job is taken")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path(settings["output"]["path"]).exists()


def test_an_id_column_that_does_not_exist_is_refused(job):
    settings = job(TEXTS)
    settings["input"]["id"] = "doc"
    with pytest.raises(UserError, match="no column 'doc'"):
        resolve(parse_spec(settings))


@pytest.mark.parametrize(
    ("read", "output", "refused"),
    [
        ("corpus", "corpus/out", True),
        ("corpus", "corpus", True),
        ("corpus", "corpus-out", False),
        ("corpus/*.parquet", "corpus/out", False),
        ("corpus/*", "corpus/out", True),
        ("corpus/*/*/*.parquet", "corpus/out", True),
        ("corpus/**/*.parquet", "corpus/deep/out", True),
        ("corpus/a.parquet", "corpus", False),
        (["other/a.parquet", "corpus"], "corpus/out", True),
        ("s3://bucket/corpus", "corpus/out", False),
        ("corpus", "s3://bucket/out", True),
    ],
)
def test_an_output_that_the_next_run_would_read_is_refused(read, output, refused):
    spec = parse_spec({"model": "m", "input": {"path": read}, "generate": {}, "output": {"path": output}})
    if refused:
        with pytest.raises(UserError, match=r"output\.path"):
            refuse_output_in_input(spec)
    else:
        refuse_output_in_input(spec)


def test_an_output_inside_the_job_that_is_read_is_refused():
    spec = parse_spec({"model": "m", "input": {"job": "out/a"}, "generate": {}, "output": {"path": "out/a/b"}})
    with pytest.raises(UserError, match="inside the job that is read"):
        refuse_output_in_input(spec)


def test_a_folder_that_holds_other_peoples_parts_is_refused(job):
    settings = job(TEXTS)
    parts = Path(settings["output"]["path"]) / "parts"
    parts.mkdir(parents=True)
    (parts / "theirs.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"has a folder parts/ but no job\.json"), open_store(parse_spec(settings)):
        pytest.fail("the folder is taken")


def test_the_same_relative_path_in_another_directory_is_another_input(job, tmp_path, monkeypatch):
    settings = job(TEXTS)
    settings["input"]["path"] = "rows.parquet"
    monkeypatch.chdir(tmp_path)
    with open_store(parse_spec(settings)) as store:
        fingerprint = store.job.fingerprint
    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.copy(tmp_path / "rows.parquet", moved)
    monkeypatch.chdir(moved)
    with open_store(parse_spec(settings)) as store:
        assert store.job.fingerprint == fingerprint
        assert [file.path for file in store.job.source.files] == [str(moved / "rows.parquet")]
    pq.write_table(pa.table({"body": ["other", "rows"], "title": ["a", "b"]}), "rows.parquet")
    with pytest.raises(UserError, match=r"input\.files differs") as caught, open_store(parse_spec(settings)):
        pytest.fail("the job is taken")
    assert "\n" not in str(caught.value)


def test_an_output_that_is_a_file_is_refused(job):
    settings = job(TEXTS)
    Path(settings["output"]["path"]).write_text("")
    with pytest.raises(UserError, match="is a file; name a folder"), open_store(parse_spec(settings)):
        pytest.fail("the file is taken")


def test_an_output_that_cannot_be_written_fails_in_one_line(job, monkeypatch):
    settings = job(TEXTS)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(JobError, match="permission denied; choose another"), open_store(parse_spec(settings)):
        pytest.fail("the folder is taken")


def test_a_job_is_planned_once(job):
    spec = parse_spec(job(TEXTS))
    with open_store(spec) as store:
        planned = store.folder.plan_file.read_bytes()
    with open_store(spec) as store:
        assert store.folder.plan_file.read_bytes() == planned
        assert [split.first_row for split in store.job.splits] == [0]


def test_what_a_crash_or_a_person_left_to_mend_is_told_in_the_run_log(job):
    spec = parse_spec(job(TEXTS))
    with open_store(spec) as store:
        builder = PartBuilder(RecordLayout.of(samples=1, embeds=None), split=0, first_row=0, num_rows=len(TEXTS))
        for row in range(len(TEXTS)):
            builder.fail(row, RowError("internal", "broken"))
        store.log.commit(builder.write(store.folder))
        part, log = store.folder.part(0), store.folder.root / "run.log"
        assert not part.exists()
        assert not log.exists()
    with open_store(spec):
        assert part.exists()
    assert "controller INFO committed and not yet in parts/, which is mended: split 0" in log.read_text()
    part.unlink()
    with open_store(spec) as store:
        assert not store.committed()
    assert "controller WARNING a committed part is gone, and its rows are done again: split 0" in log.read_text()


def test_auto_stays_what_it_was_when_the_job_was_planned(job, monkeypatch):
    settings = job(TEXTS)
    settings["output"].pop("rows_per_split")
    with open_store(parse_spec(settings)) as store:
        first = store.job.fingerprint
    monkeypatch.setattr("jobs.resolve.auto_rows_per_split", lambda num_rows: 7)
    with open_store(parse_spec(settings)) as store:
        assert store.job.fingerprint == first


def test_a_moved_input_is_the_same_job(job, tmp_path):
    settings = job(TEXTS)
    with open_store(parse_spec(settings)):
        pass
    moved = tmp_path / "moved"
    moved.mkdir()
    (tmp_path / "rows.parquet").rename(moved / "rows.parquet")
    with open_store(parse_spec(settings | {"input": {"path": str(moved / "rows.parquet")}})) as store:
        assert len(store.job.splits) == 1
        assert store.job.source.files[0].path == str(moved / "rows.parquet")


def plan(settings) -> None:
    with open_store(parse_spec(settings)):
        pass


def test_a_changed_input_is_refused_by_name(job):
    plan(job(TEXTS))
    settings = job([*TEXTS[:-1], "another"])
    with pytest.raises(JobError, match=r"rows\.parquet has changed since the job was planned"):
        plan(settings)


def test_an_input_that_has_grown_is_refused_by_name(job, tmp_path):
    settings = job(TEXTS)
    settings["input"] = {"path": str(tmp_path / "*.parquet")}
    plan(settings)
    (tmp_path / "more.parquet").write_bytes((tmp_path / "rows.parquet").read_bytes())
    with pytest.raises(JobError, match=r"more\.parquet has been added since the job was planned"):
        plan(settings)


def test_changed_weights_are_refused_by_name(job):
    settings = job(TEXTS)
    plan(settings)
    (Path(settings["model"]) / "model.safetensors").write_bytes(b"others")
    with pytest.raises(JobError, match=r"the model has changed since .*: model\.safetensors; put the old one back"):
        plan(settings)


def test_the_directory_of_another_job_is_refused_with_what_differs(job):
    settings = job(TEXTS)
    plan(settings)
    with pytest.raises(UserError, match=r"holds another job: generate\.max_new_tokens differs"):
        plan(settings | {"generate": {"max_new_tokens": 5}})
    with pytest.raises(UserError, match=r"holds this job with output\.columns \[body\]"):
        plan(settings | {"output": settings["output"] | {"columns": ["title"]}})
    plan(settings | {"name": "renamed", "engine": {"max_sequences": 4}, "limits": {"max_error_rate": 0.1}})


@pytest.mark.parametrize(("planned", "asked"), [("auto", "int8"), ("int8", "auto"), ("bfloat16", "float32")])
def test_rows_of_two_number_formats_are_kept_apart(job, planned, asked):
    settings = job(TEXTS)
    plan(settings | {"cluster": {"threads": 1, "dtype": planned}})
    with pytest.raises(UserError, match=rf"holds this job with cluster\.dtype {planned}, and rows of {asked}.*ask for"):
        plan(settings | {"cluster": {"threads": 1, "dtype": asked}})
    plan(settings | {"cluster": {"threads": 2, "replicas": 2, "dtype": planned}})


def test_a_second_run_is_refused_while_the_first_lives(job):
    settings = job(TEXTS)
    with (
        open_store(parse_spec(settings)),
        pytest.raises(JobError, match=f"is in use by process {os.getpid()}"),
        open_store(parse_spec(settings)),
    ):
        pytest.fail("two hold the directory")
    plan(settings)


def test_differences_are_named_by_their_dotted_keys():
    before = {"generate": {"n": 1, "seed": 0}, "embed": None, "rows_per_split": 8}
    now = {"generate": {"n": 2, "seed": 0}, "embed": {"of": "both"}, "rows_per_split": 8}
    assert differences(before, now) == ["generate.n", "embed"]


def test_vectors_that_the_model_has_not_are_refused_before_anything_is_written(job, tiny_model):
    for embed, expected in (({"dimensions": 61}, "have 60"), ({"routing_weight": 1.0}, "no experts")):
        settings = job(TEXTS, embed=embed) | {"model": str(tiny_model("llama"))}
        with pytest.raises(UserError, match=expected), open_store(parse_spec(settings)):
            pytest.fail("the job is taken")
        assert not Path(settings["output"]["path"]).exists()


def test_dimensions_that_the_model_keeps_are_those_of_the_job_that_names_none(job, tiny_model, tmp_path):
    model = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    settings = job(TEXTS, embed={}) | {"model": str(model)}
    (model / "config_sentence_transformers.json").write_text('{"truncate_dim": 8}')
    assert resolve(parse_spec(settings)).spec.embed.dimensions == 8
    (model / "config_sentence_transformers.json").write_text('{"truncate_dim": 61}')
    with pytest.raises(UserError, match=r"embed\.dimensions: 61, and the model's hidden states have 60"):
        resolve(parse_spec(settings))


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        ({"kind": "PQ7"}, "no FAISS factory string for 60 dimensions"),
        ({"kind": "IVF8,Flat"}, "trained on 8 vectors or more, and of 6 there are 5 to train on"),
        ({"memory_bytes": 1000}, "building SQ8 over 6 vectors"),
        ({"kind": "HNSW8", "memory_bytes": "10MiB"}, "building HNSW8 over 6 vectors"),
    ],
)
def test_an_index_that_cannot_be_built_is_refused_before_its_rows_are_run(job, tiny_model, index, expected):
    settings = job(TEXTS, embed={"of": "both"}, index=index) | {"model": str(tiny_model("llama"))}
    with pytest.raises(UserError, match=expected):
        refuse_unbuildable(resolve(parse_spec(settings)))
    refuse_unbuildable(resolve(parse_spec(settings | {"index": {"kind": "IVF4,Flat"}})))


def test_attention_rules_for_layers_that_the_model_has_not_are_refused_before_anything_is_written(job, tiny_model):
    settings = job(TEXTS) | {"model": str(tiny_model("llama"))}
    spec = parse_spec(settings | {"attention": [{"layers": "0-9", "pattern": "sliding", "window": 8}]})
    with pytest.raises(UserError, match=r"layers '0-9': no layer 9 in the model, its last is 3"), open_store(spec):
        pytest.fail("the job is taken")
    assert not Path(settings["output"]["path"]).exists()
