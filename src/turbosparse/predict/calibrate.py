"""Thresholds for all layers at once: what is lost has one unit, so that it is lost where it costs least.

A threshold decides how many neurons of a layer are selected, and how many nats the others cost. At a price for a
selected neuron, the best threshold of a layer is where the nats that it keeps minus the price of the neurons that it
selects is largest. One price for all layers then loses the fewest nats for so many neurons; it is lowered until the
layers keep the share of |h| that was asked for, on average.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from turbosparse.predict.measure import Curve

_LOWEST, _HIGHEST = -60.0, 10.0  # log of a price
_STEPS = 60


def price_for(curves: Sequence[Curve], recall: float) -> float:
    """The highest price, in nats a neuron, at which the mean share of |h| over the layers reaches `recall`."""
    low, high = _LOWEST, _HIGHEST
    for _ in range(_STEPS):
        middle = (low + high) / 2
        kept = np.mean([layer.mass[layer.best(float(np.exp(middle)))] for layer in curves])
        low, high = (middle, high) if kept >= recall else (low, middle)
    return float(np.exp(low))
