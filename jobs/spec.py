"""What a person asks for: a job's settings, parsed once and frozen, and the fingerprint that tells two jobs apart.

Reading YAML, overrides and the wording of complaints is in `specfile.py`. Whatever needs the model or the input to be
settled (which column, how many rows a split) is in `resolve.py`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from jobs.cluster import node_labels
from pipeline.errors import UserError
from workers.decoder.attention_rules import AttentionRule

JsonObject = dict[str, Any]

_BYTE_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def _refusal(message: str) -> PydanticCustomError:
    return PydanticCustomError("setting", "{wanted}", {"wanted": message})


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _count_or_auto(value: object) -> object:
    if value == "auto" or _is_count(value):
        return value
    raise _refusal("must be a whole number of at least 1, or auto")


def _number_or_auto(value: object) -> object:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    raise _refusal("must be a whole number of at least 0, or auto")


def _bytes_or_auto(value: object) -> object:
    if value == "auto" or _is_count(value):
        return value
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?i?B)", value, re.IGNORECASE) if isinstance(value, str) else None
    if size and size[2].lower() in _BYTE_UNITS and (num_bytes := int(float(size[1]) * _BYTE_UNITS[size[2].lower()])):
        return num_bytes
    raise _refusal("must be a number of bytes, a size such as 2GiB, or auto")


def parse_size(name: str, value: object) -> int:
    """`value` as the setting `name`: a number of bytes, or a size such as 2GiB. UserError for anything else."""
    if _is_count(value):
        return int(str(value))
    try:
        size = _bytes_or_auto(value)
    except PydanticCustomError:
        size = "auto"
    if not isinstance(size, int):
        raise UserError(f"{name} {value}: must be a number of bytes, or a size such as 2GiB")
    return size


def _auto_or_bool(value: object) -> object:
    if value == "auto" or isinstance(value, bool):
        return value
    raise _refusal("must be auto, true or false")


def _path_or_paths(value: object) -> object:
    if value is None or (isinstance(value, str) and value):
        return value
    if isinstance(value, list | tuple) and value and all(isinstance(path, str) and path for path in value):
        return tuple(value)
    raise _refusal("must be a path or a list of paths")


def _names_or_auto(value: object) -> object:
    if value == "auto":
        return value
    if isinstance(value, list | tuple) and all(isinstance(name, str) and name for name in value):
        if len(set(value)) < len(value):
            raise _refusal("must name each column once")
        return tuple(value)
    raise _refusal("must be a list of column names, or auto")


def _label_rules(value: dict[str, str]) -> dict[str, str]:
    if found := node_labels.complaint(value):
        raise _refusal(found)
    return node_labels.plain(value)


Count = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]
CountOrAuto = Annotated[int | Literal["auto"], BeforeValidator(_count_or_auto)]
BytesOrAuto = Annotated[int | Literal["auto"], BeforeValidator(_bytes_or_auto)]


# Settings of `embed` that came later, as they are where they change nothing: they are then no part of a fingerprint.
_WITHOUT_EFFECT = {
    "dimensions": None,
    "passage_prompt": "",
    "query_prompt": "",
    "include_prompt": True,
    "echo": False,
    "center": False,
}


class Section(BaseModel):
    """Frozen; unknown keys and wrong types are refused, nothing is coerced but a whole number to a float."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class InputSpec(Section):
    path: Annotated[str | tuple[str, ...] | None, BeforeValidator(_path_or_paths)] = None
    job: Text | None = None
    id: Text | None = None
    format: Text = "auto"  # by the files' names; `lines` or `text` where plain text is otherwise than they suggest

    @model_validator(mode="after")
    def _one_source(self) -> InputSpec:
        if self.path and self.job:
            raise _refusal("path and job are both set; keep the one to read from")
        if not self.path and not self.job:
            raise _refusal("names nothing to read; set input.path (a file, a folder, a glob, a URI) or input.job")
        return self


class Example(Section):
    """One exchange shown to the model before the row's own prompt."""

    user: str
    assistant: str


class PromptSpec(Section):
    template: Text | None = None
    column: Text | None = None
    chat: Annotated[bool | Literal["auto"], BeforeValidator(_auto_or_bool)] = "auto"
    system: Text | None = None
    examples: Annotated[tuple[Example, ...], Field(strict=False)] = ()
    on_too_long: Literal["error", "truncate"] = "error"

    @model_validator(mode="after")
    def _one_text(self) -> PromptSpec:
        if self.template is not None and self.column is not None:
            raise _refusal("template and column are both set; keep one")
        return self


class GenerateSpec(Section):
    """None leaves a setting to the model's generation_config.json, and without one to greedy decoding, no filter."""

    max_new_tokens: Count = 64
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None  # 0: no filter, whatever generation_config.json says
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    stop: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    stop_token_ids: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)] = ()
    n: Count = 1
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    logprobs: bool = False


class EmbedSpec(Section):
    of: Literal["prompt", "generation", "both"] = "prompt"
    template: Text | None = None
    query_template: Text = "{{ text }}"
    pooling: Literal["auto", "mean", "last", "weighted_mean"] = "auto"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    passage_prompt: str = "auto"
    query_prompt: str = "auto"
    include_prompt: Annotated[bool | Literal["auto"], BeforeValidator(_auto_or_bool)] = "auto"
    echo: Annotated[bool | Literal["auto"], BeforeValidator(_auto_or_bool)] = "auto"
    center: Annotated[bool | Literal["auto"], BeforeValidator(_auto_or_bool)] = "auto"
    routing_weight: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _template_is_used(self) -> EmbedSpec:
        if self.template is not None and self.of == "generation":
            raise _refusal("template replaces the prompt as the embedded text, but of: generation embeds no prompt")
        if self.query_prompt not in ("auto", "") and self.query_template != "{{ text }}":
            raise _refusal("query_prompt and query_template are both set; write the prompt into the template")
        return self

    @property
    def fields(self) -> tuple[str, ...]:
        """The vector columns of a part."""
        return ("prompt_embedding", "generation_embedding") if self.of == "both" else ("embedding",)


class IndexSpec(Section):
    kind: Text = "auto"
    shards: CountOrAuto = "auto"
    memory_bytes: BytesOrAuto = "auto"
    recall: Annotated[float, Field(ge=0, le=1)] = 0.95


class OutputSpec(Section):
    path: Text
    columns: Annotated[tuple[str, ...] | Literal["auto"], BeforeValidator(_names_or_auto)] = "auto"
    rows_per_split: CountOrAuto = "auto"


class EngineSpec(Section):
    kv_cache_bytes: BytesOrAuto = "auto"
    max_context: CountOrAuto = "auto"
    step_tokens: CountOrAuto = "auto"
    max_sequences: CountOrAuto = "auto"


class LimitsSpec(Section):
    max_error_rate: Annotated[float, Field(ge=0, le=1)] = 0.5


class ClusterSpec(Section):
    replicas: CountOrAuto = "auto"
    expert_parallel: CountOrAuto = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    threads: CountOrAuto = "auto"
    address: Text | None = None
    labels: Annotated[dict[str, str], AfterValidator(_label_rules)] = {}
    spread: bool = False
    wait_s: Annotated[float, Field(gt=0)] | None = None
    calibration_rows: Annotated[int | Literal["auto"], BeforeValidator(_number_or_auto)] = "auto"
    spare_experts: Annotated[int | Literal["auto"], BeforeValidator(_number_or_auto)] = "auto"


def _layers_text(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return str(value)
    return value


class AttentionRuleSpec(Section):
    """An `AttentionRule` (workers/decoder/attention_rules.py says what each means), which checks what goes together."""

    pattern: Literal["full", "sliding", "strided", "fixed"]
    layers: Annotated[Text, BeforeValidator(_layers_text)] = "all"
    window: Count | None = None
    stride: Count | None = None
    block: Count | None = None
    summary: Count | None = None
    form: Literal["merged", "alternating", "divided"] | None = None
    distinct: bool | None = None

    @model_validator(mode="after")
    def _makes_sense(self) -> AttentionRuleSpec:
        try:
            AttentionRule(**self.model_dump())
        except ValueError as error:
            raise _refusal(str(error)) from None
        return self


class JobSpec(Section):
    """One job. `output.path` is `out/NAME`, and `index` is on for a job that embeds, unless they are given.

    `index: false` in a job file is None here.
    """

    name: Annotated[str, Field(pattern=r"^[^/\\\s][^/\\\n]*$")] = "job"
    model: Text
    input: InputSpec
    prompt: PromptSpec = PromptSpec()
    generate: GenerateSpec | None = None
    embed: EmbedSpec | None = None
    attention: Annotated[tuple[AttentionRuleSpec, ...], Field(strict=False, min_length=1)] | None = None
    index: IndexSpec | None = None
    output: OutputSpec
    engine: EngineSpec = EngineSpec()
    limits: LimitsSpec = LimitsSpec()
    cluster: ClusterSpec = ClusterSpec()

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        optional = ("prompt", "index", "output", "engine", "limits", "cluster")
        filled = {key: value for key, value in given.items() if not (value is None and key in optional)}
        if filled.get("index") is False:  # vectors and no index
            filled["index"] = None
        elif filled.get("embed") is not None:
            filled.setdefault("index", {})
        output = filled.setdefault("output", {})
        if isinstance(output, Mapping) and output.get("path") is None:
            filled["output"] = {**output, "path": f"out/{filled.get('name', 'job')}"}
        return filled

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> JobSpec:
        if self.generate is None and self.embed is None:
            raise _refusal("asks for nothing: set generate or embed (`generate: {}` takes the defaults)")
        if self.generate is None:
            if self.embed is not None and self.embed.of != "prompt":
                raise _refusal(f"embed.of: {self.embed.of} needs something generated, and generate is not set")
            for key in ("system", "examples"):
                if getattr(self.prompt, key):
                    raise _refusal(f"prompt.{key} is for generation, and generate is not set")
            if self.prompt.chat is True:
                raise _refusal("prompt.chat is for generation (embedded text never passes through the chat template)")
        if self.embed is None and self.index is not None:
            raise _refusal("index is set but embed is not: there would be no vectors to index")
        if (
            self.generate is None
            and self.embed is not None
            and self.embed.template is not None
            and (self.prompt.template is not None or self.prompt.column is not None)
        ):
            raise _refusal("embed.template replaces the prompt, and nothing is generated from it: keep one of the two")
        return self

    @property
    def attention_rules(self) -> tuple[JsonObject, ...]:
        """In the workers' terms, without what is not given."""
        return tuple(rule.model_dump(mode="json", exclude_defaults=True) for rule in self.attention or ())

    def to_json(self) -> JsonObject:
        document = self.model_dump(mode="json")
        if self.embed is not None and self.index is None:
            document["index"] = False
        return document


def fingerprint_parts(
    spec: JobSpec, *, model_digest: Mapping[str, str], input_files: Sequence[tuple[str, str]], rows_per_split: int
) -> JsonObject:
    """Everything that a job's results depend on, by the key that it comes from.

    `model_digest`: file name -> digest. `input_files`: (file name, digest) in row order. What is digested is the bytes
    and never where they lie, so that a moved model or data set is the same job. `rows_per_split` is the number used.
    """
    parts: JsonObject = {
        "model": dict(sorted(model_digest.items())),
        "input": {"id": spec.input.id, "format": spec.input.format, "files": [list(file) for file in input_files]},
        "prompt": spec.prompt.model_dump(mode="json"),
        "generate": spec.generate.model_dump(mode="json") if spec.generate else None,
        "embed": _embed_covered(spec.embed) if spec.embed else None,
        "rows_per_split": rows_per_split,
    }
    if spec.attention is not None:  # left out where it is not: jobs from before it stay the same jobs
        parts["attention"] = list(spec.attention_rules)
    return parts


def _embed_covered(embed: EmbedSpec) -> JsonObject:
    values = embed.model_dump(mode="json")
    return {key: value for key, value in values.items() if key not in _WITHOUT_EFFECT or value != _WITHOUT_EFFECT[key]}


def fingerprint(parts: JsonObject) -> str:
    """The sha256 of `fingerprint_parts`, in hexadecimal."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
