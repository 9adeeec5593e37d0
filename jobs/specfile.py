"""Reading a job's YAML: `load_spec` gives a JobSpec, or one line that says what is wrong, where, and what was meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from jobs.spec import JobSpec
from pipeline.errors import UserError, one_line

KeyPath = tuple[str | int, ...]

_MAX_COMPLAINTS = 3


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but 1e-3 is a number."""


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back: text that would be a number there is quoted."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def load_spec(path: str | Path, overrides: Sequence[str] = (), *, output: str | None = None) -> JobSpec:
    """Read a job file. `overrides` are KEY=VALUE with dotted keys and YAML values; `output` replaces output.path.

    The job's name is the file's, unless it has one. Raises UserError with one line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such job file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from None
    settings, lines = _parse_yaml(text, where=str(path))
    if not isinstance(settings, dict):
        raise UserError(f"{path}: must be a mapping of settings, such as `model: ...`")
    origins = {key: f"{path}, line {line}" for key, line in lines.items()}
    settings.setdefault("name", re.sub(r"[/\\\s]", "-", path.stem))
    return parse_spec(settings, overrides, output=output, where=str(path), origins=origins)


def dump_spec(spec: JobSpec) -> str:
    """A job file that `load_spec` reads as this very job: what was set, without the defaults of this version."""
    # In ASCII: of other characters YAML takes some (U+0085) for line breaks.
    return yaml.dump(spec.model_dump(mode="json", exclude_unset=True), Dumper=_Dumper, sort_keys=False)


def parse_spec(
    settings: Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    output: str | None = None,
    where: str = "job",
    origins: Mapping[KeyPath, str] | None = None,
) -> JobSpec:
    """Settings as YAML or Python gives them -> JobSpec. `where` and `origins` say in complaints where a key stands."""
    origins = dict(origins or {})
    merged = dict(settings)
    for override in overrides:
        key = _apply_override(merged, override)
        origins = {place: origin for place, origin in origins.items() if place[: len(key)] != key}
        origins[key] = f"--set {override}"
    if output is not None:
        _apply(merged, ("output", "path"), output, "--output")
    try:
        return JobSpec.model_validate(merged)
    except ValidationError as error:
        raise UserError(_describe(error, where, origins)) from None


def _parse_yaml(text: str, *, where: str) -> tuple[Any, dict[KeyPath, int]]:
    """The document, and the line (from 1) of every key in it."""
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            lines: dict[KeyPath, int] = {}
            if node is not None:
                lines = dict(_key_lines(node, (), where, frozenset()))
            return (loader.construct_document(node) if node is not None else None), lines
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {one_line(error)}") from None
    except UserError:
        raise
    except (RecursionError, ValueError) as error:
        raise UserError(f"{where}: not valid YAML: {one_line(error)}") from None


def _key_lines(node: yaml.Node, path: KeyPath, where: str, inside: frozenset[int]) -> Iterator[tuple[KeyPath, int]]:
    """Every key and list item under `node` with its line; refuses keys that stand twice and aliases to themselves."""
    if id(node) in inside:
        raise UserError(f"{where}, line {node.start_mark.line + 1}: this alias contains itself")
    inside = inside | {id(node)}
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            yield (*path, number), item.start_mark.line + 1
            yield from _key_lines(item, (*path, number), where, inside)
    elif isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            place = _spell((*path, name))
            if name in seen:
                raise UserError(f"{where}, line {line}: `{place}` is set twice (first on line {seen[name]})")
            bare = isinstance(value, yaml.ScalarNode) and value.value == "" and value.tag.endswith(":null")
            if bare and (*path, name) in {("generate",), ("embed",)}:
                raise UserError(
                    f"{where}, line {line}: `{place}` has no value; write `{place}: {{}}` for its defaults, "
                    f"or leave the key out"
                )
            seen[name] = line
            yield (*path, name), line
            yield from _key_lines(value, (*path, name), where, inside)


def _apply_override(settings: dict[str, Any], override: str) -> KeyPath:
    key, equals, text = override.partition("=")
    names = tuple(key.strip().split("."))
    if not equals or not all(names):
        raise UserError(f"--set {override}: must be KEY=VALUE, such as generate.max_new_tokens=32")
    value, _ = _parse_yaml(text, where=f"--set {override}")
    _apply(settings, names, value, f"--set {override}")
    return names


def _apply(settings: dict[str, Any], names: tuple[str, ...], value: Any, where: str) -> None:
    """Set one dotted key, copying the mappings on the way (the caller's stay as they are)."""
    here = settings
    for depth, name in enumerate(names[:-1], start=1):
        below = here.get(name)
        if below is not None and not isinstance(below, Mapping):
            raise UserError(f"{where}: `{'.'.join(names[:depth])}` is no section, so it has no keys")
        here[name] = dict(below or {})
        here = here[name]
    here[names[-1]] = value


def _describe(error: ValidationError, where: str, origins: Mapping[KeyPath, str]) -> str:
    details = sorted(error.errors(include_url=False), key=lambda detail: detail["type"] != "extra_forbidden")
    complaints = []
    for detail in details[:_MAX_COMPLAINTS]:
        place = tuple(detail["loc"])
        origin = next((origins[place[:depth]] for depth in range(len(place), 0, -1) if place[:depth] in origins), where)
        complaints.append(f"{origin}: {_complaint(detail, place)}")
    more = len(details) - len(complaints)
    return "; ".join(complaints) + (f"; and {more} more" if more else "")


_WORDING = {
    "missing": "is missing",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "string_type": "must be text",
    "bool_type": "must be true or false",
    "tuple_type": "must be a list",
    "model_type": "must be a section with keys of its own",
    "model_attributes_type": "must be a section with keys of its own",
    "dict_type": "must be a section with keys of its own",
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": "must be a plain name without slashes",
    "literal_error": "must be {expected}",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
}


def _complaint(detail: ErrorDetails, place: KeyPath) -> str:
    kind = detail["type"]
    if kind in ("extra_forbidden", "invalid_key"):
        place = (*place[:-1], str(place[-1]))
        return f"unknown key `{_spell(place)}`{_suggestion(place)}"
    context = {key: str(value).replace("'", "") for key, value in detail.get("ctx", {}).items()}
    wording = _WORDING[kind].format(**context) if kind in _WORDING else str(detail["msg"])
    wording = " ".join(wording.split())
    if not place:
        return f"the job {wording}" if wording.startswith("asks") else wording
    value = detail["input"]
    got = "" if kind == "missing" or isinstance(value, Mapping | BaseModel) else f", not {_short(value)}"
    return f"`{_spell(place)}` {wording}{got}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _spell(place: KeyPath) -> str:
    """("prompt", "examples", 0, "user") -> prompt.examples[0].user"""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")


def _known_keys(section: type[BaseModel], path: str = "") -> Iterator[tuple[str, str]]:
    """(section's path, key) of every key that a job may have."""
    for name, field in section.model_fields.items():
        yield path, name
        for candidate in (field.annotation, *get_args(field.annotation)):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                yield from _known_keys(candidate, f"{path}.{name}".lstrip("."))


def _suggestion(place: KeyPath) -> str:
    """The nearest key of the same section, or the same key where it belongs."""
    name = str(place[-1])
    path = re.sub(r"\[\d+\]", "", _spell(place[:-1]))
    known = list(_known_keys(JobSpec))
    beside = [key for section, key in known if section == path]
    candidates = [
        *(_spell((*place[:-1], key)) for key in difflib.get_close_matches(name, beside, n=1, cutoff=0.8)),
        *(f"{section}.{key}".lstrip(".") for section, key in known if key == name),
        *(_spell((*place[:-1], key)) for key in difflib.get_close_matches(name, beside, n=1, cutoff=0.55)),
        *(_spell((*place[:-1], key)) for key in beside if name in key or key in name),
    ]
    if candidates:
        return f" (did you mean `{candidates[0]}`?)"
    return f" (known here: {', '.join(beside)})" if beside else ""
