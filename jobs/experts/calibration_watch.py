"""Which gangs are calibrating, and whether it is worth letting another: a row in the sample may be one that kills."""

from __future__ import annotations

MOST_BROKEN = 2  # gangs that died while they calibrated, after which the run deals experts out in turn


class CalibrationWatch:
    def __init__(self) -> None:
        self._under_way: set[str] = set()
        self._num_broken = 0

    @property
    def gave_up(self) -> bool:
        return self._num_broken >= MOST_BROKEN

    def begin(self, gang: str) -> None:
        self._under_way.add(gang)

    def end(self, gang: str) -> None:
        """It told what it found."""
        self._under_way.discard(gang)

    def lose(self, gang: str) -> None:
        """The gang is no more; while it calibrated, if it had not told what it found."""
        if gang in self._under_way:
            self._under_way.discard(gang)
            self._num_broken += 1
