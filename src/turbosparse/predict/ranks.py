"""How wide the predictor of each layer is, under one budget of bytes.

What a layer costs at a width is measured: quick fits on a part of the text, each at its best threshold for one price
of a selected neuron (calibrate.py). Blocks of 32 rows are given out one by one, each to the layer whose cost it lowers
most.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from turbosparse.predict.measure import Curve

BLOCK = 32  # rows of fc2 are then whole blocks of Q4_0 and Q8_0


def tried(blocks: int, layers: int) -> list[int]:
    """Ranks to measure: half of what every layer gets if all get the same, that, and twice that."""
    equal = blocks // layers
    return sorted({max(1, equal // 2) * BLOCK, equal * BLOCK, 2 * equal * BLOCK})


def cost(curve: Curve, price: float) -> float:
    """Nats a token that a layer loses, and pays for the neurons that it selects."""
    index = curve.best(price)
    return float(curve.whole[3] - curve.sums[3, index] + price * curve.sums[0, index])


def share_out(ranks: Sequence[int], costs: Sequence[Sequence[float]], blocks: int) -> list[int]:
    """The layers' ranks, `blocks` times 32 in all; `costs` are each layer's at `ranks`, between them linear."""
    steps = np.arange(ranks[0], ranks[-1] + 1, BLOCK)
    gains = [-np.diff(np.interp(steps, ranks, layer)) for layer in costs]
    chosen = [0] * len(costs)  # index into steps
    for _ in range(blocks - len(costs) * ranks[0] // BLOCK):
        open_ = [layer for layer, at in enumerate(chosen) if at < len(steps) - 1]
        if not open_:
            break
        chosen[max(open_, key=lambda layer: gains[layer][chosen[layer]])] += 1
    return [int(steps[at]) for at in chosen]
