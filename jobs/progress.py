"""How far a job is: what the controller reports while it runs, and what a progress bar is drawn from."""

from __future__ import annotations

from dataclasses import dataclass

ROWS_PHASE = "rows"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a job stands, sent by the controller about once a second. Tokens and time are of this run alone."""

    phase: str  # what is being done now, for people: "loading the model", ROWS_PHASE, "index"
    rows_done: int
    rows_total: int
    rows_at_start: int  # done before this run
    error_rows: int
    prompt_tokens: int
    completion_tokens: int
    elapsed_s: float  # since the first row could start

    @property
    def tokens_per_s(self) -> float:
        return (self.prompt_tokens + self.completion_tokens) / self.elapsed_s if self.elapsed_s > 0 else 0.0

    @property
    def left_s(self) -> float | None:
        """None until a row of this run is done."""
        done = self.rows_done - self.rows_at_start
        return self.elapsed_s * (self.rows_total - self.rows_done) / done if done > 0 else None
