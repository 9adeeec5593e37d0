"""Which filters and methods can make something large, and how large. Each guard has its function's arguments.

A guard raises OverLimit; whatever else is wrong with the arguments is left for the function itself to say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pipeline.templates.limits import Meter, OverLimit

_MAX_PRECISION = 300
_MAX_LEISURELY_CHARS = 100_000  # for filters that take long over what they do
_PIECES_PER_ITEM = 4  # a text may be split into so many times as many pieces as other lists may have items

Guard = Callable[..., None]


def _length(value: object) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple | dict) else 0


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


def _width(meter: Meter, value: object, width: object = 80, *_: object) -> None:
    meter.allow(_number(width))


def _indent(meter: Meter, s: object, width: object = 4, first: object = False, blank: object = False) -> None:
    lines = s.count("\n") + 1 if isinstance(s, str) else 1
    meter.allow(_length(s) + lines * (_number(width) if isinstance(width, int) else _length(width)))


def _batch(meter: Meter, value: object, linecount: object, fill_with: object = None) -> None:
    meter.allow_items(_number(linecount))


def _slice(meter: Meter, value: object, slices: object, fill_with: object = None) -> None:
    meter.allow_items(_number(slices))


def _round(meter: Meter, value: object, precision: object = 0, method: object = "common") -> None:
    if abs(_number(precision)) > _MAX_PRECISION:
        raise OverLimit(f"rounds to a precision of more than {_MAX_PRECISION} places")


def _replace(meter: Meter, s: object, old: object, new: object, count: object = None) -> None:
    if isinstance(s, str | bytes) and isinstance(old, type(s)):
        times = s.count(old)  # type: ignore[arg-type]  # both are text or both bytes
        meter.allow(_length(s) + times * max(0, _length(new) - _length(old)))


def _join(meter: Meter, value: object, d: object = "", attribute: object = None) -> None:
    meter.allow_text(value, extra=_length(d))


def _join_method(meter: Meter, separator: object, values: object = (), *_: object) -> None:
    if not isinstance(values, str | list | tuple | dict):
        raise OverLimit("joins something that is no list")
    meter.allow(_length(separator) * _length(values))
    meter.allow_text(values, extra=_length(separator))


def _wordwrap(
    meter: Meter,
    s: object,
    width: object = 79,
    break_long_words: object = True,
    wrapstring: object = None,
    break_on_hyphens: object = True,
) -> None:
    meter.allow(_length(s) * (1 + _length(wrapstring)))


def _tojson(
    meter: Meter,
    x: object,
    ensure_ascii: object = False,
    indent: object = None,
    separators: Any = None,
    sort_keys: object = False,
) -> None:
    extra = sum(map(_length, separators)) if isinstance(separators, list | tuple) else 0
    meter.allow_text(x, extra=extra, indent=_number(indent) if isinstance(indent, int) else _length(indent))


def _format(meter: Meter, value: object, *args: object, **kwargs: object) -> None:
    if isinstance(value, str | bytes):
        meter.allow_format(value)
        percent, brace = ("%", "{") if isinstance(value, str) else (b"%", b"{")
        times = value.count(percent) + value.count(brace)  # type: ignore[arg-type]
        meter.allow_text(value, args, kwargs, times=times)


def _split(meter: Meter, value: object, sep: object = None, maxsplit: object = -1) -> None:
    if isinstance(value, str):
        separators = [sep] if isinstance(sep, str) and sep else [" ", "\n", "\t"]
        meter.allow_items(sum(value.count(separator) for separator in separators) // _PIECES_PER_ITEM)


def _splitlines(meter: Meter, value: object, keepends: object = False) -> None:
    if isinstance(value, str):
        meter.allow_items((value.count("\n") + value.count("\r")) // _PIECES_PER_ITEM)


def _expandtabs(meter: Meter, value: object, tabsize: object = 8) -> None:
    meter.allow(_length(value) * max(1, _number(tabsize)))


def _printed(meter: Meter, value: object, *_: object, **__: object) -> None:
    meter.allow_text(value)


def _leisurely(meter: Meter, value: object, *_: object, **__: object) -> None:
    meter.allow_text(value, times=meter.limits.max_chars // _MAX_LEISURELY_CHARS)


def _refused(meter: Meter, *_: object, **__: object) -> None:
    raise OverLimit("calls a method that templates may not call")


FILTER_GUARDS: Mapping[str, Guard] = {
    "batch": _batch,
    "center": _width,
    "dictsort": _printed,
    "format": _format,
    "groupby": _printed,
    "indent": _indent,
    "join": _join,
    "max": _printed,
    "min": _printed,
    "pprint": _leisurely,
    "replace": _replace,
    "round": _round,
    "slice": _slice,
    "sort": _printed,
    "string": _printed,
    "tojson": _tojson,
    "unique": _printed,
    "urlize": _leisurely,
    "wordwrap": _wordwrap,
    "xmlattr": _leisurely,
}

COMPARING_TESTS = frozenset(
    ["==", "!=", "<", "<=", ">", ">=", "eq", "equalto", "ge", "greaterthan", "gt", "le", "lessthan", "lt", "ne"]
) | {"in", "iterable", "lower", "sequence", "upper"}

# What these give does not depend on the texts in the list that they are given.
LIST_FILTERS = frozenset(
    ["batch", "count", "first", "last", "length", "list", "map", "reject", "rejectattr", "reverse", "select"]
) | {"selectattr", "slice"}

METHOD_GUARDS: Mapping[str, Guard] = {
    "center": _width,
    "expandtabs": _expandtabs,
    "format": _format,
    "format_map": _format,
    "join": _join_method,
    "ljust": _width,
    "replace": _replace,
    "rjust": _width,
    "rsplit": _split,
    "split": _split,
    "splitlines": _splitlines,
    "to_bytes": _refused,
    "translate": _refused,
    "zfill": _width,
}
