"""From a trained stack to predictors as they are stored, their curves and their thresholds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from turbosparse.predict.calibrate import price_for
from turbosparse.predict.fit import Tokens
from turbosparse.predict.measure import Curve, curve, edges, low_rank
from turbosparse.predict.sinks import FEW_TOKENS, always_selecting
from turbosparse.predict.stack import Stack
from turbosparse.predict.together import Ground
from turbosparse.predict.write import StoredPredictor

_LARGEST_SHIFT = 30.0
_STEPS = 40


def stored(stack: Stack, ground: Ground) -> list[StoredPredictor]:
    """Rounded, with the neurons that are always selected; thresholds are not chosen yet."""
    predictors = []
    for layer, always in enumerate(ground.always):
        fc1, fc2 = (matrix.cpu().numpy() for matrix in stack.layer(layer))
        plain = StoredPredictor.of(fc1, fc2, stack.kinds)
        predictors.append(always_selecting(plain, always, ground.inputs(layer)[:FEW_TOKENS]))
    return predictors


def curves(
    predictors: Sequence[StoredPredictor],
    ground: Ground,
    tuned: Sequence[Tokens],
    measured: Sequence[Tokens] | None = None,
) -> list[Curve]:
    """Of all layers on `measured`, over thresholds that follow from `tuned`; without `measured`, on these."""
    found = []
    for layer, (predictor, tokens) in enumerate(zip(predictors, tuned, strict=True)):
        fc1, fc2 = ground.on_device(*predictor.matrices())
        scores = low_rank(fc1, fc2)
        tried = edges(tokens, scores, fc1.device)
        on = tokens if measured is None else measured[layer]
        found.append(curve(on, scores, ground.nats[layer].to(fc1.device), tried))
    return found


def by_price(found: Sequence[Curve], recall: float) -> tuple[list[int], float]:
    """Index of each layer's threshold at one price for all, where they keep `recall` of |h| on average; that price."""
    price = price_for(found, recall)
    return [layer.best(price) for layer in found], price


def by_shift(found: Sequence[Curve], thresholds: Sequence[float], recall: float) -> list[int]:
    """The same where all thresholds move by one number from those that the layers were trained for."""

    def moved(shift: float) -> list[int]:
        return [
            min(int(np.searchsorted(layer.score, threshold + shift)), len(layer.score) - 1)
            for layer, threshold in zip(found, thresholds, strict=True)
        ]

    low, high = -_LARGEST_SHIFT, _LARGEST_SHIFT
    for _ in range(_STEPS):
        middle = (low + high) / 2
        kept = np.mean([layer.mass[index] for layer, index in zip(found, moved(middle), strict=True)])
        low, high = (middle, high) if kept >= recall else (low, middle)
    return moved(low)
