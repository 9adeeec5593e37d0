"""One schema for an input of many files, and what to say of columns that don't fit into it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipeline.errors import UserError
from pipeline.formats.json_types import merge
from pipeline.suggest import did_you_mean


@dataclass(frozen=True, slots=True)
class InputSchema:
    """The columns of an input. `problems`: why a column can't be used, though some file has it; one line each."""

    fields: pa.Schema
    problems: Mapping[str, str] = field(default_factory=dict)

    @property
    def usable(self) -> list[str]:
        """The columns that there is no problem with."""
        return [name for name in self.fields.names if name not in self.problems]

    @property
    def text_columns(self) -> list[str]:
        """The usable columns that hold text and nothing but text."""
        return [name for name in self.usable if pa.types.is_string(self.fields.field(name).type)]

    def select(self, names: Sequence[str]) -> pa.Schema:
        """Just these columns, each once. UserError for one that is unknown or unusable."""
        chosen: dict[str, pa.Field[Any]] = {}
        for name in names:
            if name in self.problems:
                raise UserError(f"input: {self.problems[name]}")
            if self.fields.get_field_index(name) < 0:
                columns = ", ".join(self.fields.names)
                raise UserError(
                    f"input has no column {name!r}{did_you_mean(name, self.fields.names)} (it has: {columns})"
                )
            chosen[name] = self.fields.field(name)
        return pa.schema(list(chosen.values()))


def merge_schemas(files: Sequence[tuple[str, pa.Schema]], *, sparse: bool) -> InputSchema:
    """Bring the (plain) schemas of files together; `files` are (name, schema).

    Numbers widen and missing types take the other files' type. A column of types that don't go together is a problem,
    and so is one that a file lacks, unless files are `sparse` and only show the columns of their first records.
    """
    first_name, first = files[0]
    kinds: dict[str, pa.DataType] = {}
    origins: dict[str, str] = {}
    problems: dict[str, str] = {}
    for name, schema in files:
        if schema is first and name != first_name:
            continue
        for column in schema:
            if len(schema.get_all_field_indices(column.name)) > 1:
                problems[column.name] = f"two columns of {name} are called {column.name!r}"
            known = kinds.setdefault(column.name, column.type)
            merged = _common(known, column.type)
            if merged is None:
                detail = f"{known} in {origins[column.name]} but {column.type} in {name}"
                problems.setdefault(
                    column.name, f"column {column.name!r} is {detail}; read those files in jobs of their own"
                )
            else:
                kinds[column.name] = merged
            origins.setdefault(column.name, name)
    for name, schema in [] if sparse else files:
        if schema.names != first.names or name == first_name:
            for missing in kinds.keys() - set(schema.names):
                detail = f"column {missing!r} is in {origins[missing]} but not in {name}"
                problems.setdefault(missing, f"{detail}; name only files that have it")
    return InputSchema(pa.schema([pa.field(column, kind) for column, kind in kinds.items()]), problems)


def _common(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    merged = merge(one, other)
    if merged is not None:
        return merged
    for family in (_is_number, pa.types.is_temporal):
        if family(one) and family(other):
            try:
                fields = [pa.schema([pa.field("", one)]), pa.schema([pa.field("", other)])]
                common: pa.DataType = pa.unify_schemas(fields, promote_options="permissive").field(0).type
                return common
            except (pa.ArrowInvalid, pa.ArrowTypeError):
                return None
    return None


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))
