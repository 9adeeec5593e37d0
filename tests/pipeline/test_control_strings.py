from __future__ import annotations

from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pipeline.control_strings import ControlStrings, reveal

CONTROL = ControlStrings(["<s>", "</s>", "<s><s>", "[INST]", ".*"])
PIECES = st.sampled_from(["<s>", "</s>", "[INST]", ".*", "a", " ", "<", "s>", "\U000f0000", "\U000f0001", "\U00100000"])
TEXT = st.lists(PIECES, max_size=8).map("".join)
VALUES = st.dictionaries(
    st.sampled_from(["a", "b"]),
    st.recursive(
        TEXT | st.none() | st.integers(), lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner)
    ),
)


def texts_in(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for item in inner for text in texts_in(item)]


@given(VALUES, TEXT)
def test_what_is_hidden_is_gone_and_comes_back_where_it_was(values: dict[str, Any], beside: str) -> None:
    hidden, markers = CONTROL.hide(values, beside)
    assert not any(CONTROL.occur_in(text) for text in texts_in(hidden))
    assert not set(markers) & set(beside)
    for before, after in zip(texts_in(values), texts_in(hidden), strict=True):
        text, spans = reveal(after, markers)
        assert text == before
        assert all(CONTROL.occur_in(text[start:end]) for start, end in spans)
        assert all(one[1] <= other[0] for one, other in pairwise(spans))
        outside = "\0".join(
            text[end:start]
            for end, start in zip([0, *(e for _, e in spans)], [*(s for s, _ in spans), len(text)], strict=True)
        )
        assert not CONTROL.occur_in(outside)


def test_the_longest_string_counts() -> None:
    hidden, markers = CONTROL.hide({"a": "<s><s>"})
    assert reveal(hidden["a"], markers) == ("<s><s>", ((0, 6),))


def test_no_strings_hide_nothing() -> None:
    nothing = ControlStrings([])
    assert not nothing.occur_in("anything <s>")
    assert nothing.hide({"a": "<s>"}) == ({"a": "<s>"}, {})


def test_thousands_of_strings_are_no_trouble() -> None:
    many = ControlStrings([f"<unused{i}>" for i in range(6000)])
    text = "<unused5999>" * 3 + "<unused>" + "word " * 1000
    hidden, markers = many.hide({"a": text})
    assert reveal(hidden["a"], markers)[1] == ((0, 12), (12, 24), (24, 36))
