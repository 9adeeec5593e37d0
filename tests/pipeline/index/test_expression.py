"""What a filter means, and that everything else is refused in one line that says what there is."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal

import pyarrow as pa
import pytest

from pipeline.errors import UserError
from pipeline.index.expression import Filter

ROWS = pa.table(
    {
        "lang": ["en", "de", None, "en"],
        "year": [2019, 2020, 2021, None],
        "when": [dt.datetime(2024, 1, day) for day in range(1, 5)],
        "day": [dt.date(2024, 1, day) for day in range(1, 5)],
        "meta": [{"a": 1}, {"a": 2}, {"a": None}, None],
        "title": ["Fox one", "fox two", "Three", None],
        "odd name": [1.5, 2.5, 3.5, 4.5],
        "ok": [True, False, None, True],
        "kind": pa.array(["a", "b", None, "a"]).dictionary_encode(),
        "price": pa.array([Decimal("1.50"), Decimal("2.25"), None, Decimal("3.00")]),
        "seen": pa.array([dt.datetime(2024, 1, day, 23) for day in range(1, 5)], pa.timestamp("us", "Europe/Lisbon")),
        "at": pa.array([dt.time(day) for day in (1, 2, 3, 4)]),
    }
)
PARTS = ("day", "when", "seen", "at", "kind", "price")
INNER = pa.StructArray.from_arrays([ROWS[name].chunk(0) for name in PARTS], names=PARTS)
ROWS = ROWS.append_column("of", pa.StructArray.from_arrays([INNER], names=["it"]))


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("lang == 'en' and year >= 2019", [0]),
        ("lang == 'de' or ok", [0, 1, 3]),
        ("lang != 'en'", [1]),  # where there is no value, no comparison holds
        ("not lang == 'en'", [1]),
        ("not (lang == 'en' or year == 2020)", []),
        ("lang in ('en', 'fr')", [0, 3]),
        ("lang not in ['en']", [1]),
        ("year in {2019, 2021}", [0, 2]),
        ("lang is None", [2]),
        ("lang is not None and lang != 'de'", [0, 3]),
        ("2019 < year <= 2021", [1, 2]),
        ("when >= '2024-01-02' and when < '2024-01-03 12:00:00'", [1, 2]),
        ("day in ('2024-01-02',)", [1]),
        ("'2024-01-03' <= day", [2, 3]),
        ("meta.a == 2", [1]),
        ("'ox' in title", [0, 1]),
        ("'ox' not in title", [2]),
        ("startswith(title, 'Fox')", [0]),
        ("title.endswith('two') or contains(title, 'hre')", [1, 2]),
        ("lower(title) == 'fox one' or title.upper() == 'THREE'", [0, 2]),
        ("length(title) > 5", [0, 1]),
        ("year - 1 == 2019 or year * 2 == 4038", [0, 1]),
        ("column('odd name') > 2.5", [2, 3]),
        ("year == -1", []),
        ("year in (2019.5, 2020.0)", [1]),
        ("kind in ('a', 'c') and startswith(kind, 'a') and kind != 'b'", [0, 3]),
        ("price in (1.5, 3) and price / 2 > 1", [3]),
        ("seen >= '2024-01-02' and seen < '2024-01-04T02:00:00Z'", [1, 2]),
        ("at > '02:00:00'", [2, 3]),
        ("day == '2024-01-02T00:00'", [1]),
        ("(year - 2019) / 2 == 0.5 or 1 / (year - 2019) > 1", [0, 1]),
        ("ok", [0, 3]),
        ("of.it.day >= '2024-01-03' and of.it.when < '2024-01-04'", [2]),
        ("of.it.day in ('2024-01-02',) or '03:00:00' < of.it.at", [1, 3]),
        ("of.it.seen >= '2024-01-02' and of.it.seen < '2024-01-04T02:00:00Z'", [1, 2]),
        ("of.it.kind in ('a', 'c') and startswith(of.it.kind, 'a') and of.it.kind != 'b'", [0, 3]),
        ("of.it.price in (1.5, 3) and of.it.price / 2 > 1", [3]),
    ],
)
def test_an_expression_means_these_rows(text: str, rows: list[int]) -> None:
    table = ROWS.append_column("number", pa.array(range(4)))
    assert table.filter(Filter.parse(text).over(ROWS.schema))["number"].to_pylist() == rows


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "empty"),
        ("lang ==", "not an expression"),
        ("import os", "not an expression"),
        ("1 == 1", "it names no column"),
        ("langg == 'en'", r"no column 'langg'; did you mean 'lang'\?; there are lang, year, when"),
        ("year == 'x'", "int64, string"),
        ("at > '2'", "'2' is none; write it like '13:05:00'"),
        ("at > '02:00:00+01:00'", "'02:00:00\\+01:00' is none; write it like '13:05:00'"),
        ("day < '2024-01-02 12:00'", "day is of type date32.*'2024-01-02 12:00' is none; write it like '2024-05-31'"),
        ("lang == '\\ud800'", "half of a surrogate pair"),
        ("year > 99999999999999999999", "a number in it is too large"),
        ("year in ('a',)", "can't be compared with year, which is of type int64"),
        ("year", "it is of type int64, and is to say yes or no of a row"),
        ("lang == None", "write `is None`"),
        ("lang is 'en'", "only None can"),
        ("lang in year", "can't stand after `in`"),
        ("when > 'tomorrow'", "'tomorrow' is none; write it like '2024-05-31'"),
        ("meta.b == 1", "has no part|no part of"),
        ("of.it.dai in ('2024-01-02',)", "of.it.dai is no part of column 'of'"),
        ("of.it.day > 'tomorrow'", "of.it.day is of type date32.*'tomorrow' is none; write it like '2024-05-31'"),
        ("lang[0] == 'e'", "is not understood; there are comparisons"),
        ("lang.__class__ == 'e'", "no part"),
        ("(lambda: lang)()", "is not understood"),
        ("exec(lang)", "is not understood; there are startswith"),
        ("title.startswith(lang)", "is not understood; there are startswith"),
        ("lang if ok else lang", "is not understood"),
        ("(" * 300 + "year" + ")" * 300, "not an expression"),
        ("not " * 2000 + "ok", "not an expression|nested too deeply"),
        ("ok and " * 2000 + "ok", "longer than"),
    ],
)
def test_anything_else_is_refused_in_one_line(text: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected) as caught:
        Filter.parse(text).over(ROWS.schema)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("--filter")


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("views > 1.5", [0, 2, 3]),
        ("few / 10 == 0.3 or 0.5 * views == 0.5", [0, 1]),
        ("few + 100 > 200 and few * few > 10000", [2]),
        ("few in (3, 3000) and few - 1000 < 0", [0]),
        ("hash > 5", [2, 3]),
        ("hash == 18446744073709551615 or 9223372036854775808 == hash", [2, 3]),
        ("hash in (-1, 5, 5.5)", [0]),
        ("half > 1.5 and half in (2, 3.5)", [1]),
        ("single in (0.1, 0.5) and single == 0.1 and not single > 0.1", [0]),
        ("single < 20000000001 and single * views > 0", [0, 2]),
    ],
)
def test_numbers_of_every_width_are_compared_and_computed_as_what_they_are(text: str, rows: list[int]) -> None:
    table = pa.table(
        {
            "views": pa.array([10, 1, 20_000_001, 2_000_000_001], pa.int32()),
            "few": pa.array([3, None, 120, 100], pa.int8()),
            "hash": pa.array([5, None, 1 << 63, (1 << 64) - 1], pa.uint64()),
            "half": pa.array([1, 2, None, 3], pa.float16()),
            "single": pa.array([0.1, None, 0.75, 1e30], pa.float32()),
        }
    )
    found = table.append_column("number", pa.array(range(4))).filter(Filter.parse(text).over(table.schema))
    assert found["number"].to_pylist() == rows


def test_it_says_which_columns_it_needs() -> None:
    assert Filter.parse("a == 1 and startswith(b, 'x') and column('c d') in (1, 2)").columns == {"a", "b", "c d"}
    assert Filter.parse("lower == 'x'").columns == {"lower"}
