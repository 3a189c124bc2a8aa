"""Neurons that are always selected, whatever their predictor says.

A neuron or two of a few layers make attention sinks: hundreds of times as large as all others together, on one token in
hundreds, and a sink that is missed spoils every token after it. They are too rare to be learned well, and too few to
cost anything. So a neuron that once cost more than a nat is always selected: its row of fc2 becomes a positive
constant, which makes its score a multiple of the sum of all units, and that is above every threshold.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from turbosparse.model.quantize import quantize
from turbosparse.predict.fit import MOST_NATS
from turbosparse.predict.write import StoredPredictor

_FEWEST_OTHERS = 64  # of so many neurons, at most one is always selected
FEW_TOKENS = 2048  # that tell how high scores are


def sinks(largest: Tensor, worth: Tensor) -> Tensor:
    """Which neurons these are, bool [ffn], from the largest |h| of each and its nats over h^2."""
    cost = largest.square() * worth
    few = max(1, len(cost) // _FEWEST_OTHERS)
    return (cost >= MOST_NATS) & (cost >= cost.topk(few).values[-1])


def always_selecting(stored: StoredPredictor, neurons: Tensor, x: Tensor) -> StoredPredictor:
    """The predictor with these neurons' rows set; x, float32 [FEW_TOKENS, hidden], says how high scores are."""
    fc1, fc2 = (torch.from_numpy(matrix).to(x.device) for matrix in stored.matrices())
    hidden = torch.relu(x @ fc1.T)
    highest = (hidden @ fc2.T).max().clamp_min(1.0)
    constant = float(2 * highest / hidden.sum(1).min().clamp_min(1e-3))
    rows = stored.fc2.copy()
    rows[neurons.cpu().numpy()] = quantize(np.full((1, stored.rank), constant, np.float32), stored.kinds[1])
    return replace(stored, fc2=rows)
