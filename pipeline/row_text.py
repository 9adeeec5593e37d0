"""A row's own text: a column, or a template over columns. The columns that a part carries are enough to rebuild it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import pyarrow as pa

from pipeline.errors import RowError, UserError
from pipeline.python_values import values_of
from pipeline.schemas import InputSchema
from pipeline.templates.environment import BoundedEnvironment
from pipeline.templates.limits import TemplateLimits
from pipeline.templates.template import Template

EMPTY = RowError("empty_prompt", "the text is empty")

_NO_ERRORS: Mapping[int, RowError] = {}


class RowText:
    """Builds the text of rows. `columns` are the input's columns that it needs.

    `section` is the part of the job's spec that the settings come from, for error messages. UserError where a column is
    unknown or holds no text, the template is none, or nothing says which of several columns is meant.
    """

    def __init__(
        self,
        schema: InputSchema,
        *,
        column: str | None = None,
        template: str | None = None,
        text_column: str | None = None,
        section: str = "prompt",
        limits: TemplateLimits | None = None,
    ) -> None:
        self.template: Template | None = None
        self._direct: frozenset[str] = frozenset()  # columns that the template names itself
        self._through_row: frozenset[str] = frozenset()  # columns that it names as row["..."]
        if template is not None:
            environment = BoundedEnvironment(
                limits or TemplateLimits(), refuse_null=True, undefined=jinja2.StrictUndefined
            )
            self.template = Template(template, environment, title=f"{section}.template")
            self.columns = self._named_columns(self.template, schema, section)
            self._parts = self._simple_parts(self.template)
        else:
            name = column or text_column or _only_text_column(schema, section)
            kind = schema.select([name]).field(0).type
            if not (pa.types.is_string(kind) or pa.types.is_binary(kind) or pa.types.is_null(kind)):
                raise UserError(
                    f"{section}.column {name!r} holds {kind}, not text; "
                    f'print it with {section}.template: "{{{{ {name} }}}}"'
                )
            self.columns = (name,)

    @property
    def written(self) -> str:
        """What of the text its author wrote, not the rows."""
        return self.template.literal_text if self.template is not None else ""

    def texts(self, batch: pa.RecordBatch, errors: Mapping[int, RowError] = _NO_ERRORS) -> list[str | RowError]:
        """The text of each row; `errors`, by offset, stay. Empty text is `empty_prompt`, null is `not_text`."""
        errors = dict(errors)
        columns = [values_of(batch.column(name), name, errors) for name in self.columns]
        texts: list[str | RowError]
        if self.template is None:
            texts = [
                value if value and not value.isspace() else EMPTY if value is not None else _null(self.columns)
                for value in columns[0]
            ]
        elif self._parts is not None:
            texts = self._printed(columns, self._parts)
        else:
            rows = zip(*columns, strict=True) if columns else ((),) * batch.num_rows
            texts = [
                errors[offset] if offset in errors else self.text(dict(zip(self.columns, values, strict=True)))
                for offset, values in enumerate(rows)
            ]
        for offset, error in errors.items():
            texts[offset] = error
        return texts

    def values(self, batch: pa.RecordBatch, offset: int) -> dict[str, Any] | RowError:
        """What the row holds in these columns."""
        errors: dict[int, RowError] = {}
        values = {name: values_of(batch.column(name).slice(offset, 1), name, errors)[0] for name in self.columns}
        return errors.get(0, values)

    def text(self, values: Mapping[str, Any]) -> str | RowError:
        """The text of one row that holds these values."""
        if self.template is None:
            value = values[self.columns[0]]
            return _null(self.columns) if value is None else _checked(value)
        visible = {name: values[name] for name in self._direct}
        if self._through_row:
            visible["row"] = {name: values[name] for name in self._through_row}
        text = self.template.render(visible)
        if isinstance(text, RowError):
            nulls = [name for name in self.columns if values[name] is None]
            return _null(nulls) if text.code == "not_text" and nulls else text
        return _checked(text)

    def _named_columns(self, template: Template, schema: InputSchema, section: str) -> tuple[str, ...]:
        names = set(template.variables)
        if "row" in names and "row" not in schema.fields.names:
            subscripts = template.subscripts_of("row")
            if subscripts is None:
                raise UserError(f'{section}.template: `row` is for naming a column, as in {{{{ row["Review Text"] }}}}')
            self._through_row = subscripts
            names.remove("row")
        functions = {name for name in template.functions if name not in schema.fields.names}  # `range` and the like
        self._direct = frozenset(names - functions)
        columns = tuple(sorted(self._direct | self._through_row))
        try:
            schema.select(columns)
        except UserError as error:
            raise UserError(f"{section}.template: {error}") from error
        return columns

    def _simple_parts(self, template: Template) -> tuple[list[str], list[int]] | None:
        """Of a template that only prints columns: the text around them, and which columns they are."""
        if template.parts is None or self._through_row:
            return None
        literals, indices = [""], []
        for part in template.parts:
            if isinstance(part, str):
                literals[-1] += part
            elif part.name in self.columns:
                indices.append(self.columns.index(part.name))
                literals.append("")
            else:
                return None
        return (literals, indices) if indices else None

    def _printed(self, columns: Sequence[list[Any]], parts: tuple[list[str], list[int]]) -> list[str | RowError]:
        (first, *after), indices = parts
        never_empty = any(not text.isspace() for text in (first, *after) if text)
        texts: list[str | RowError] = []
        for values in zip(*[columns[index] for index in indices], strict=True):
            if None in values:
                texts.append(
                    _null([self.columns[i] for i, value in zip(indices, values, strict=True) if value is None])
                )
                continue
            text = first + "".join([str(value) + literal for value, literal in zip(values, after, strict=True)])
            texts.append(text if never_empty else _checked(text))
        return texts


def _checked(text: str) -> str | RowError:
    return text if text and not text.isspace() else EMPTY


def _null(columns: Sequence[str]) -> RowError:
    return RowError("not_text", f"column {', '.join(f'`{name}`' for name in columns)} is null")


def _only_text_column(schema: InputSchema, section: str) -> str:
    texts = schema.text_columns
    if len(texts) != 1:
        found = f"has {len(texts)} text columns ({', '.join(texts)})" if texts else "has no text column"
        raise UserError(f"input {found}: say {section}.column or {section}.template")
    return texts[0]
