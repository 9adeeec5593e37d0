"""A gang that dies while it calibrates is tried again, but not for ever."""

from __future__ import annotations

from jobs.experts.calibration_watch import CalibrationWatch


def test_a_second_gang_that_breaks_over_it_is_the_last_that_tries() -> None:
    watch = CalibrationWatch()
    for gang in ("worker-0.0", "worker-0.1"):
        assert not watch.gave_up
        watch.begin(gang)
        watch.lose(gang)
    assert watch.gave_up


def test_a_gang_that_dies_after_it_calibrated_or_never_did_blames_nothing_on_it() -> None:
    watch = CalibrationWatch()
    watch.begin("worker-0.0")
    watch.end("worker-0.0")
    for gang in ("worker-0.0", "worker-0.1", "worker-0.2", "worker-0.3"):
        watch.lose(gang)
    assert not watch.gave_up
