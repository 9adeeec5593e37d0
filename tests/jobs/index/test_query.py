"""What is asked of an index in this process, up to where the model would be loaded."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from jobs.client import JobResult
from pipeline.errors import UserError
from pipeline.job_folder import JobFolder

MadeIndex = Callable[..., JobFolder]


def test_no_texts_have_no_answers_and_what_is_asked_is_checked_all_the_same(made_index: MadeIndex) -> None:
    result = JobResult(out=made_index(["a", "b"]).root, report={})
    assert result.search([]) == []
    with pytest.raises(UserError, match="no column 'keys'"):
        result.search([], filter="keys == 'a'")
    for k in (0, -1):
        with pytest.raises(UserError, match=rf"^query: k {k} is not in the range k >= 1$"):
            result.search(["a"], k=k)
