"""How the engine chooses the number of its threads on a busy machine (csrc/pace.h)."""

from __future__ import annotations

import pytest

from turbosparse import _native


def jobs_until(pace: _native.Pace, size: int, stalled: float, most: int = 5000) -> int:
    """Report the same stall until the pace reaches `size`; returns how many reports that took."""
    for count in range(1, most + 1):
        pace.report(stalled)
        if pace.size == size:
            return count
    raise AssertionError(f"still {pace.size} members after {most} jobs")


def test_a_team_that_does_not_stall_keeps_its_size() -> None:
    pace = _native.Pace(4)
    for _ in range(1000):
        pace.report(0.1)
        assert pace.size == 4


def test_one_hiccup_is_not_a_busy_machine() -> None:
    pace = _native.Pace(2)
    for index in range(1000):
        pace.report(1.0 if index % 100 == 0 else 0.02)
        assert pace.size == 2


def test_a_stalling_team_loses_members_one_by_one_and_never_the_last() -> None:
    pace = _native.Pace(3)
    assert jobs_until(pace, 2, 0.6) < 20
    assert jobs_until(pace, 1, 0.6) < 20
    for _ in range(10):
        pace.report(0.0)
        assert pace.size == 1


def test_it_tries_again_less_and_less_often_while_the_machine_stays_busy() -> None:
    pace = _native.Pace(2)
    jobs_until(pace, 1, 0.6)
    waits = []
    for _ in range(7):
        waits.append(jobs_until(pace, 2, 0.0))
        jobs_until(pace, 1, 0.6)
    assert waits == [32, 64, 128, 256, 512, 1024, 1024]


def test_it_comes_back_when_the_machine_is_free_again() -> None:
    pace = _native.Pace(2)
    jobs_until(pace, 1, 0.6)
    jobs_until(pace, 2, 0.0)
    for _ in range(200):  # the larger team proves itself
        pace.report(0.0)
        assert pace.size == 2
    jobs_until(pace, 1, 0.6)  # busy once more: the first try comes soon again
    assert jobs_until(pace, 2, 0.0) == 32


def test_a_pace_needs_a_member() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        _native.Pace(0)
