from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from workers.engine.stopping import StopSearch


class Pieces:
    """A decoder whose token i is the i-th piece; the last one is held back until the flush."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces

    def push(self, token_id: int) -> str:
        return self.pieces[token_id] if token_id < len(self.pieces) - 1 else ""

    def flush(self) -> str:
        return self.pieces[-1]


def read(pieces: list[str], *stops: str) -> tuple[str, int | None]:
    """-> the text, and the token that ended it (None: the end of the pieces)."""
    search = StopSearch(Pieces(pieces), stops)
    for token in range(len(pieces)):
        if search.push(token):
            return search.text, token
    ended = len(pieces) if search.flush() else None
    return search.text, ended


def test_a_stop_string_across_three_tokens_is_found_and_left_out() -> None:
    assert read(["abc EN", "D O", "F TEXT and", " more", ""], "END OF TEXT") == ("abc ", 2)


def test_text_before_the_stop_string_in_the_same_token_is_kept() -> None:
    assert read(["ab", "cd\nef", ""], "\n") == ("abcd", 1)


def test_of_two_stop_strings_in_one_token_the_first_counts() -> None:
    assert read(["one two three", ""], "three", "two") == ("one ", 0)


def test_a_stop_string_may_come_with_what_was_held_back() -> None:
    assert read(["one ", "two"], "two") == ("one ", 2)


def test_without_a_match_the_text_is_whole() -> None:
    assert read(["one ", "tw", "o"], "twice") == ("one two", None)


@given(st.lists(st.text("ab", max_size=4), min_size=1, max_size=8), st.lists(st.text("ab", min_size=1, max_size=4)))
def test_it_agrees_with_looking_at_the_whole_text_again_after_each_token(pieces: list[str], stops: list[str]) -> None:
    expected: tuple[str, int | None] = "".join(pieces), None
    for token in [*range(len(pieces) - 1), len(pieces)]:
        text = "".join(pieces[: token + 1])
        found = [text.find(stop) for stop in stops if stop in text]
        if found:
            expected = text[: min(found)], token
            break
    assert read(pieces, *stops) == expected
