"""How many neurons a predictor that learns beside a model (predictable.py) must select, counted during validation."""

from __future__ import annotations

import torch
from torch import Tensor

from turbosparse.relufy.predictable import LayerPredictor, sampled
from turbosparse.relufy.sparsity import ActivationTap

_BINS = 4000  # of scores, from minus to plus the largest
_LARGEST_SCORE = 20.0


class SelectionTap:
    """In the place of a LayerPredictor during validation: counts what is selected at every threshold.

    Args:
        predictor: whose hook stays on the FFN.
        statistics: the tap to call first.
    """

    def __init__(self, predictor: LayerPredictor, statistics: ActivationTap) -> None:
        self._predictor, self._statistics = predictor, statistics
        # Per bin of scores: neurons, and their |h|; fires: how many of all neurons do.
        self._counts, self._mass = predictor.threshold.new_zeros((2, _BINS), dtype=torch.float64)
        self._fires = predictor.threshold.new_zeros((), dtype=torch.float64)

    def __call__(self, gate_BTF: Tensor, up_BTF: Tensor, h_BTF: Tensor) -> None:
        self._statistics(gate_BTF, up_BTF, h_BTF)
        mass = sampled(h_BTF, self._predictor.stride).abs().double().flatten()
        score = self._predictor.scores()[2].float().flatten()
        bins = ((score + _LARGEST_SCORE) * (_BINS / (2 * _LARGEST_SCORE))).long().clamp(0, _BINS - 1)
        self._counts.index_add_(0, bins, torch.ones_like(mass))
        self._mass.index_add_(0, bins, mass)
        self._fires += (mass > 0).sum()

    def selected(self, kept: float) -> Tensor:
        """Neurons selected, over neurons that fire, at the highest threshold that keeps this share of |h|; scalar."""
        mass = self._mass.flip(0).cumsum(0)
        first = torch.searchsorted(mass, kept * mass[-1]).clamp_max(_BINS - 1)
        return self._counts.flip(0).cumsum(0)[first] / self._fires.clamp_min(1.0)
