"""`--filter`: an expression in a small part of Python's language -> an Arrow expression over columns.

    lang == 'en' and year >= 2020        comparisons, also chained: 2019 < year <= 2024
    lang in ('en', 'de')                 and `not in`
    title is not None                    where a value is missing no comparison holds, not even !=
    not startswith(title, 'Draft')       also as title.startswith('Draft')
    'fox' in title                       a part of a text
    lower(title), length(title), year - born, meta.lang, column('odd name')

What can't be understood is refused with what there is; nothing is ever evaluated as Python.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import time
from typing import Any, Final, NoReturn

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import UserError, one_line
from pipeline.suggest import did_you_mean

_MOST_CHARACTERS: Final = 10_000

_COMPARISONS: Final[Mapping[type, Callable[[Any, Any], pc.Expression]]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_ARITHMETIC: Final[Mapping[type, Callable[[Any, Any], pc.Expression]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: lambda one, other: pc.divide(one * _float(1.0), other),  # of whole numbers too as in Python
}
_WITH_TEXT: Final[Mapping[str, Callable[[Any, str], pc.Expression]]] = {
    "startswith": lambda value, text: pc.starts_with(value, pattern=text),
    "endswith": lambda value, text: pc.ends_with(value, pattern=text),
    "contains": lambda value, text: pc.match_substring(value, pattern=text),
}
_OF_TEXT: Final[Mapping[str, Callable[[Any], pc.Expression]]] = {
    "lower": lambda value: pc.utf8_lower(value),
    "upper": lambda value: pc.utf8_upper(value),
    "length": lambda value: pc.utf8_length(value),
}


@dataclass(frozen=True, slots=True)
class Filter:
    """A parsed expression that names columns, of whatever table. Made by `Filter.parse`."""

    text: str
    _tree: ast.expr

    @staticmethod
    def parse(text: str) -> Filter:
        """UserError where it is no expression. Whether columns exist is found out by `over`."""
        if not text.strip():
            raise UserError("--filter: the expression is empty")
        if len(text) > _MOST_CHARACTERS:
            raise UserError(f"--filter: the expression is longer than {_MOST_CHARACTERS:,} characters")
        try:
            found = Filter(text, ast.parse(text.strip(), mode="eval").body)
            columns = found._names()
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            reason = error.msg if isinstance(error, SyntaxError) else "it is nested too deeply or holds odd characters"
            raise UserError(f"--filter {_shown(text)}: not an expression ({reason})") from None
        if not columns:
            raise UserError(f"--filter {_shown(text)}: it names no column")
        return found

    @property
    def columns(self) -> frozenset[str]:
        """The names of all columns in it."""
        return frozenset(self._names())

    def over(self, schema: pa.Schema) -> pc.Expression:
        """The Arrow expression for tables of `schema`, true where a row is meant.

        UserError that names the columns there are for an unknown one, and says what can't be compared with what.
        """
        try:
            expression = _Translation(self.text, schema).of(self._tree)
            assert isinstance(expression, pc.Expression), "it names a column"
            _refuse_other_than_truth(self.text, schema, expression)
        except RecursionError:
            raise UserError(f"--filter {_shown(self.text)}: not an expression (it is nested too deeply)") from None
        except OverflowError:
            raise UserError(f"--filter {_shown(self.text)}: a number in it is too large") from None
        except UnicodeEncodeError:
            raise UserError(f"--filter {self.text!a}: it holds half of a surrogate pair") from None
        return expression

    def _names(self) -> set[str]:
        nodes = list(ast.walk(self._tree))
        called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
        names = {node.id for node in nodes if isinstance(node, ast.Name) and id(node) not in called}
        return names | {name for name in map(_called_column, nodes) if name is not None}


class _Translation:
    """A node -> an Arrow expression, or a Python value where it is a literal."""

    def __init__(self, text: str, schema: pa.Schema) -> None:
        self._text = text
        self._schema = schema

    def of(self, node: ast.expr) -> Any:
        match node:
            case ast.BoolOp(op=op, values=values):
                parts = [self._expression(value) for value in values]
                result = parts[0]
                for part in parts[1:]:
                    result = result & part if isinstance(op, ast.And) else result | part
                return result
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return ~self._expression(operand)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
                return -value
            case ast.Compare():
                return self._comparison(node)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                return _ARITHMETIC[type(op)](self._value(left, right), self._value(right, left))
            case ast.Constant(value=bool() | int() | float() | str() as value):
                return value
            case ast.Name(id=name):
                return self._column(name)
            case ast.Attribute():
                return self._nested(node)
            case ast.Call():
                return self._call(node)
        self._refuse(node, "is not understood; there are comparisons, and, or, not, in, is None, + - * /")

    def _expression(self, node: ast.expr) -> pc.Expression:
        found = self.of(node)
        return found if isinstance(found, pc.Expression) else pc.scalar(found)

    def _value(self, node: ast.expr, other: ast.expr) -> pc.Expression:
        found = self.of(node)
        return found if isinstance(found, pc.Expression) else _literal(self._plain(found, other))

    def _comparison(self, node: ast.Compare) -> pc.Expression:
        sides = [node.left, *node.comparators]
        pairs = zip(node.ops, sides, sides[1:], strict=False)
        result: pc.Expression | None = None
        for op, left, right in pairs:
            one = self._compared(op, left, right)
            result = one if result is None else result & one
        assert result is not None
        return result

    def _compared(self, op: ast.cmpop, left: ast.expr, right: ast.expr) -> pc.Expression:
        nothing = isinstance(right, ast.Constant) and right.value is None
        result: pc.Expression
        match op:
            case ast.Is() if nothing:
                return self._expression(left).is_null()
            case ast.IsNot() if nothing:
                result = ~self._expression(left).is_null()
                return result
            case ast.In():
                return self._contained(left, right)
            case ast.NotIn():
                return ~self._contained(left, right)
            case ast.Is() | ast.IsNot():
                self._refuse(right, "can't stand after `is`; only None can")
        if nothing or (isinstance(left, ast.Constant) and left.value is None):
            self._refuse(right if nothing else left, "can't be compared; write `is None` or `is not None`")
        one, other = self.of(left), self.of(right)
        one, other = self._like(one, right), self._like(other, left)
        return _COMPARISONS[type(op)](one, other)

    def _contained(self, left: ast.expr, right: ast.expr) -> pc.Expression:
        if isinstance(right, ast.Tuple | ast.List | ast.Set):
            values = [self.of(item) for item in right.elts]
            if any(isinstance(value, pc.Expression) for value in values):
                self._refuse(right, "may hold only numbers and texts")
            known = self._array([self._plain(value, left) for value in values], left, right)
            # Null is in no list: without this `not in` would hold for it.
            column = self._expression(left)
            result: pc.Expression = pc.if_else(column.is_null(), pa.scalar(None, pa.bool_()), column.isin(known))
            return result
        if isinstance(left, ast.Constant) and isinstance(left.value, str):
            return pc.match_substring(self._expression(right), pattern=left.value)
        self._refuse(right, "can't stand after `in`; a list like ('en', 'de') can, and a column after a text")

    def _array(self, values: list[Any], left: ast.expr, right: ast.expr) -> pa.Array[Any]:
        kind = self._kind(left)
        if kind is not None and pa.types.is_integer(kind):  # Arrow would take 1.5 for 1
            values = [value for value in values if not isinstance(value, float) or value.is_integer()]
        if kind == pa.uint64():
            values = [value for value in values if not isinstance(value, int | float) or value >= 0]
        try:
            return pa.array(values, kind)
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            self._refuse(right, f"can't be compared with {_source(left)}, which is of type {kind}")

    def _like(self, value: Any, other: ast.expr) -> Any:
        """A literal beside a column of dates or times: its text is read as one."""
        return value if isinstance(value, pc.Expression) else _literal(self._plain(value, other))

    def _plain(self, value: Any, other: ast.expr) -> Any:
        stored = self._stored(other)
        if isinstance(value, float) and stored in (pa.float16(), pa.float32()):
            return pa.scalar(value, stored).as_py()  # 0.1 is what the column has for it
        kind = None if stored is None else _compared_as(stored)
        if isinstance(value, int) and kind == pa.uint64() and 0 <= value < 1 << 64:
            return pa.scalar(value, kind)  # else Arrow compares as int64, which the column's values may not fit
        if not isinstance(value, str) or kind is None or not pa.types.is_temporal(kind):
            return value
        try:
            return _moment(value, kind)
        except (pa.ArrowException, ValueError):
            like = "13:05:00" if pa.types.is_time(kind) else "2024-05-31"
            self._refuse(other, f"is of type {kind}, and {value!r} is none; write it like '{like}'")

    def _kind(self, node: ast.expr) -> pa.DataType | None:
        """The type that a column, or a part of one, is compared as; None of anything else."""
        stored = self._stored(node)
        return None if stored is None else _compared_as(stored)

    def _stored(self, node: ast.expr) -> pa.DataType | None:
        """The type that it has."""
        if isinstance(node, ast.Attribute):
            return self._part(node)[1]
        name = node.id if isinstance(node, ast.Name) else _called_column(node)
        return self._schema.field(name).type if name in self._schema.names else None

    def _column(self, name: str) -> pc.Expression:
        if name not in self._schema.names:
            near = did_you_mean(name, self._schema.names)
            raise UserError(
                f"--filter {_shown(self._text)}: there is no column {name!r}{near}; "
                f"there are {', '.join(self._schema.names)}"
            )
        return _to_compare(pc.field(name), self._schema.field(name).type)

    def _nested(self, node: ast.Attribute) -> pc.Expression:
        path, kind = self._part(node)
        return _to_compare(pc.field(*path), kind)

    def _part(self, node: ast.Attribute) -> tuple[list[str], pa.DataType]:
        """Where in which column meta.lang is, and its type."""
        path: list[str] = []
        inner: ast.expr = node
        while isinstance(inner, ast.Attribute):
            path.insert(0, inner.attr)
            inner = inner.value
        if not isinstance(inner, ast.Name):
            self._refuse(node, "is not understood; a part of a column is written like meta.lang")
        self._column(inner.id)
        kind: pa.DataType = self._schema.field(inner.id).type
        for name in path:
            if not pa.types.is_struct(kind) or kind.get_field_index(name) < 0:
                self._refuse(
                    node, f"is no part of column {inner.id!r}, which is of type {self._schema.field(inner.id).type}"
                )
            kind = kind.field(name).type
        return [inner.id, *path], kind

    def _call(self, node: ast.Call) -> pc.Expression:
        name = _called_column(node)
        if name is not None:
            return self._column(name)
        function, arguments = node.func, node.args
        if isinstance(function, ast.Attribute):  # title.startswith('A')
            name, arguments = function.attr, [function.value, *arguments]
        elif isinstance(function, ast.Name):
            name = function.id
        else:
            self._refuse(node, "is not understood")
        if not node.keywords:
            if name in _OF_TEXT and len(arguments) == 1:
                return _OF_TEXT[name](self._expression(arguments[0]))
            if name in _WITH_TEXT and len(arguments) == 2:
                pattern = arguments[1]
                if isinstance(pattern, ast.Constant) and isinstance(pattern.value, str):
                    return _WITH_TEXT[name](self._expression(arguments[0]), pattern.value)
        self._refuse(
            node,
            "is not understood; there are startswith, endswith, contains (of a column and a text), "
            "lower, upper, length (of a column) and column('name')",
        )

    def _refuse(self, node: ast.expr, why: str) -> NoReturn:
        raise UserError(f"--filter {_shown(self._text)}: {_source(node)} {why}")


def _refuse_other_than_truth(text: str, schema: pa.Schema, expression: pc.Expression) -> None:
    """Tries the expression on a table without rows, for what only Arrow knows of types."""
    from pyarrow import acero

    try:
        source = acero.Declaration("table_source", acero.TableSourceNodeOptions(schema.empty_table()))
        project = acero.Declaration("project", acero.ProjectNodeOptions([expression], ["is_meant"]), [source])
        kind = project.to_table().schema.field(0).type
    except (pa.ArrowException, TypeError, NotImplementedError) as error:
        raise UserError(f"--filter {_shown(text)}: {one_line(error)}") from None
    if not pa.types.is_boolean(kind):
        raise UserError(f"--filter {_shown(text)}: it is of type {kind}, and is to say yes or no of a row")


def _literal(value: Any) -> pc.Expression:
    return _float(value) if isinstance(value, float) else pc.scalar(value)


def _float(value: float) -> pc.Expression:
    """In 64 bits: Arrow takes a plain 0.5 for a float32, and computes whole numbers beside it as such."""
    return pc.scalar(value).cast(pa.float64())


def _compared_as(kind: pa.DataType) -> pa.DataType:
    """Categories are compared as what they stand for, and numbers, decimals too, in 64 bits.

    What is computed of them is to fit.
    """
    if pa.types.is_dictionary(kind):
        value: pa.DataType = kind.value_type
        return value
    if pa.types.is_decimal(kind) or pa.types.is_floating(kind):
        return pa.float64()
    if pa.types.is_integer(kind) and kind != pa.uint64():
        return pa.int64()
    return kind


def _to_compare(column: pc.Expression, kind: pa.DataType) -> pc.Expression:
    compared = _compared_as(kind)
    return column if compared.equals(kind) else column.cast(compared)


def _moment(text: str, kind: pa.DataType) -> Any:
    """`text` as a scalar of a type of dates or times; without an offset it is of the column's own zone."""
    scalar: Any = pa.scalar(text)
    if pa.types.is_time(kind):
        at = time.fromisoformat(text)
        if at.tzinfo is not None:
            raise ValueError("times of a column have no offset")
        return pa.scalar(at, kind)
    if pa.types.is_date(kind):
        moment = scalar.cast(pa.timestamp("us"))
        day = moment.cast(kind)
        if day.cast(moment.type) != moment:
            raise ValueError("days have no time")
        return day
    if pa.types.is_timestamp(kind) and kind.tz is not None:
        try:
            return pc.assume_timezone(scalar.cast(pa.timestamp(kind.unit)), kind.tz)
        except pa.ArrowInvalid:  # it has an offset
            pass
    return scalar.cast(kind)


def _called_column(node: ast.AST) -> str | None:
    """The name in column('name'); None of anything else."""
    match node:
        case ast.Call(func=ast.Name(id="column"), args=[ast.Constant(value=str() as name)], keywords=[]):
            return name
    return None


def _source(node: ast.expr) -> str:
    return ast.unparse(node)[:80]


def _shown(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= 60 else text[:59] + "…")
