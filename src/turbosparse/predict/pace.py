"""How far a training is, by steps or by the clock, and the rate that goes with it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

_WARM = 0.1  # share of the training in which the rate rises

Pace = Callable[[int], float]


def by_steps(steps: int) -> Pace:
    """The share that is done after so many steps."""
    return lambda step: step / max(steps, 1)


def by_clock(seconds: float) -> Pace:
    """The same from now on, until so many seconds have passed."""
    begin = time.monotonic()
    return lambda step: (time.monotonic() - begin) / max(seconds, 1e-9)


def shares(pace: Pace) -> Iterator[float]:
    """The share that is done before each step; at least one step."""
    step, done = 0, 0.0
    while done < 1.0:
        yield done
        step += 1
        done = pace(step)


def rate(done: float) -> float:
    """Of the highest rate: a straight rise, then half a cosine down to a thousandth."""
    if done < _WARM:
        return max(done / _WARM, 0.04)
    return max(1e-3, 0.5 * (1 + math.cos(math.pi * (done - _WARM) / (1 - _WARM))))
