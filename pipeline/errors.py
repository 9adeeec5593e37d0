"""What can go wrong, told apart by who can mend it: the user, the job's circumstances, or nobody but the row itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_MOST_CHARS: Final = 300

ROW_ERROR_CODES = frozenset(
    {
        "empty_prompt",
        "prompt_too_long",
        "not_text",
        "malformed_record",
        "template_error",
        "request_too_large",
        "empty_generation",
        "nonfinite",
        "worker_killed",
        "internal",
    }
)


class UserError(ValueError):
    """The request was wrong. The message is one line: what, where, how to mend. The command exits with 2."""


class JobError(RuntimeError):
    """The job failed, though the request was sound. The message is one line. The command exits with 1."""


@dataclass(frozen=True, slots=True)
class RowError:
    """Why one row could not be served. A value, not an exception: one row never takes its neighbours with it.

    `code` is one of ROW_ERROR_CODES; `message` is for people.
    """

    code: str
    message: str

    def __post_init__(self) -> None:
        assert self.code in ROW_ERROR_CODES, self.code


def one_line(error: BaseException) -> str:
    """What an exception says, on one line that is cut where it would be long; its kind where it says nothing."""
    return " ".join(str(error).split())[:_MOST_CHARS] or type(error).__name__
