"""The Arrow schema of a part: one record a row and sample, the same columns in every job.

A failed row has one record, sample 0, with `error_code` and `error_message` set and everything it did not get null.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import UserError

EmbedField = Literal["prompt", "generation"]
EmbedOf = Literal["prompt", "generation", "both"]

_EMBED_KEY: Final = b"gristmill.embeds"
_OWN_NAMES: Final = frozenset(
    {
        "row",
        "id",
        "sample",
        "text",
        "finish_reason",
        "prompt_tokens",
        "completion_tokens",
        "logprobs",
        "embedding",
        "prompt_embedding",
        "generation_embedding",
        "error_code",
        "error_message",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordLayout:
    """What the records of one job look like. The same for all of its splits; made by `RecordLayout.of`."""

    schema: pa.Schema
    samples: int  # generations a row; 0 where the job does not generate
    vectors: Mapping[EmbedField, str]  # what is embedded -> the column that holds it
    carried: Mapping[str, str]  # input column -> the column it is carried into
    id_column: str | None  # input column; without one the row number is the id

    @staticmethod
    def of(
        *,
        samples: int,
        embeds: EmbedOf | None,
        dimension: int | None = None,
        carried: pa.Schema | None = None,
        id_column: pa.Field[Any] | None = None,
    ) -> RecordLayout:
        """`carried` holds the input columns to carry over, and `id_column` the one with the id, as the input has them.

        UserError for a column that Parquet can't hold, or an id that can't be written as text.
        """
        carried = pa.schema([]) if carried is None else carried
        assert samples > 0 or embeds == "prompt", "without generation there is only the prompt to embed"
        return RecordLayout(
            schema=part_schema(embeds=embeds, dimension=dimension, carried=carried),
            samples=samples,
            vectors={field: column for column, field in _vector_columns(embeds).items()},
            carried=carried_names(carried.names),
            id_column=None if id_column is None else _id_name(id_column),
        )

    @property
    def input_columns(self) -> tuple[str, ...]:
        """The input columns that a part needs, each once."""
        named = () if self.id_column is None else (self.id_column,)
        return tuple(dict.fromkeys((*named, *self.carried)))


def part_schema(*, embeds: EmbedOf | None, dimension: int | None, carried: pa.Schema) -> pa.Schema:
    """The columns of a part in their order.

    `embeds` names what is embedded, `dimension` the width of a vector. A job that embeds nothing has an `embedding`
    column too, all null and of width 0. A column that holds vectors says in its metadata of what (`embedded_fields`).
    """
    assert embeds is None or dimension, "vectors need a dimension"
    columns: Mapping[str, EmbedField | None] = _vector_columns(embeds) or {"embedding": None}
    vector = pa.list_(pa.float32(), dimension if embeds and dimension else 0)
    fields: list[pa.Field[Any]] = [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("id", pa.string()),
        pa.field("sample", pa.int32(), nullable=False),
        pa.field("text", pa.string()),
        pa.field("finish_reason", pa.string()),
        pa.field("prompt_tokens", pa.int32()),
        pa.field("completion_tokens", pa.int32()),
        pa.field("logprobs", pa.list_(pa.float32())),
        *(
            pa.field(name, vector, metadata={_EMBED_KEY: field.encode()} if field else None)
            for name, field in columns.items()
        ),
        pa.field("error_code", pa.string()),
        pa.field("error_message", pa.string()),
    ]
    names = carried_names(carried.names)
    return pa.schema([*fields, *(pa.field(names[field.name], _written_type(field)) for field in carried)])


def embedded_fields(schema: pa.Schema) -> dict[str, EmbedField]:
    """Column -> what its vectors embed, in the order of the columns; empty where nothing is embedded."""
    found: dict[str, EmbedField] = {}
    for column in schema:
        of = (column.metadata or {}).get(_EMBED_KEY)
        if of is not None:
            found[column.name] = "generation" if of == b"generation" else "prompt"
    return found


def carried_names(names: Sequence[str], own: Collection[str] = _OWN_NAMES) -> dict[str, str]:
    """Input column -> its column in the part: the same name, or `input_NAME` where the part has its own such column.

    `own`: the columns of another file than a part.

    >>> carried_names(["title", "text"])
    {'title': 'title', 'text': 'input_text'}
    """
    taken = {*own, *names}
    written: dict[str, str] = {}
    for name in names:
        target = name
        if name in own:
            while target in taken:
                target = f"input_{target}"
            taken |= {target}
        written[name] = target
    return written


def _vector_columns(embeds: EmbedOf | None) -> dict[str, EmbedField]:
    if embeds is None:
        return {}
    if embeds == "both":
        return {"prompt_embedding": "prompt", "generation_embedding": "generation"}
    return {"embedding": embeds}


def _id_name(field: pa.Field[Any]) -> str:
    try:
        pa.array([], field.type).cast(pa.string())
    except pa.ArrowException as error:
        raise UserError(
            f"input.id: column {field.name!r} is of type {field.type}, which can't be written as text"
        ) from error
    return str(field.name)


def _written_type(field: pa.Field[Any]) -> pa.DataType:
    """Encodings of a value (dictionary, run-end, views) are undone: Parquet has its own."""
    kind: pa.DataType = field.type
    if isinstance(kind, pa.DictionaryType | pa.RunEndEncodedType):
        kind = kind.value_type
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        kind = pa.large_string() if pa.types.is_string_view(kind) else pa.large_binary()
    try:
        pq.write_table(pa.schema([pa.field(field.name, kind)]).empty_table(), pa.BufferOutputStream())
    except (pa.ArrowException, NotImplementedError) as error:
        raise UserError(
            f"column {field.name!r} is of type {field.type}, which Parquet can't hold; leave it out of output.columns"
        ) from error
    return kind
