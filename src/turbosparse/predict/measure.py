"""The threshold of a fitted predictor, and what it keeps and costs, on tokens that it was not fitted on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from turbosparse.predict.fit import Tokens

_ROWS = 256  # tokens at once
_BINS = 1 << 16


@dataclass(frozen=True)
class LayerQuality:
    """One layer's predictor on held-out tokens.

    Attributes:
        layer, rank: of which layer, rows of fc1.
        bytes_share: its bytes over those of the layer's dense FFN.
        mass_kept: share of the sum of |h| that the selected neurons hold.
        recall: share of the neurons that fire that are selected.
        selected: neurons selected, over neurons that fire.
        active: share of the neurons that fire.
    """

    layer: int
    rank: int
    bytes_share: float
    mass_kept: float
    recall: float
    selected: float
    active: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def threshold_for(tokens: Tokens, fc1: Tensor, fc2: Tensor, recall: float) -> float:
    """The highest score, of 65536 tried, at which the selected neurons hold `recall` of the sum of |h|."""
    low, high = np.inf, -np.inf
    for score, _ in _scores(tokens, fc1, fc2):
        low, high = min(low, float(score.min())), max(high, float(score.max()))
    width = max((high - low) / _BINS, 1e-12)
    held = np.zeros(_BINS + 1)
    for score, mass in _scores(tokens, fc1, fc2):
        bins = ((score - low) / width).astype(np.int64).clip(0, _BINS)
        held += np.bincount(bins.reshape(-1), mass.reshape(-1), _BINS + 1)
    above = held[::-1].cumsum()[::-1]  # mass at and above each bin
    reached = np.flatnonzero(above >= recall * above[0])
    return float(np.float32(low + int(reached[-1]) * width)) if above[0] > 0 else high


def quality(tokens: Tokens, fc1: Tensor, fc2: Tensor, threshold: float, layer: int, bytes_share: float) -> LayerQuality:
    """What a predictor does at a threshold."""
    selected = hit = active = kept = whole = 0.0
    for score, mass in _scores(tokens, fc1, fc2):
        chosen, fires = score >= threshold, mass > 0
        selected += float(chosen.sum())
        active += float(fires.sum())
        hit += float((chosen & fires).sum())
        whole += float(mass.sum(dtype=np.float64))
        kept += float(mass[chosen].sum(dtype=np.float64))
    return LayerQuality(
        layer=layer,
        rank=len(fc1),
        bytes_share=bytes_share,
        mass_kept=kept / whole if whole else 1.0,
        recall=hit / active if active else 1.0,
        selected=selected / active if active else 0.0,
        active=active / (len(tokens.x) * len(fc2)),
    )


def _scores(
    tokens: Tokens, fc1: Tensor, fc2: Tensor
) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]:
    """(scores, mass), float32 [some tokens, ffn], of all tokens."""
    with torch.inference_mode():
        for start in range(0, len(tokens.x), _ROWS):
            x, mass = tokens.batch(slice(start, start + _ROWS), fc1.device)
            yield (torch.relu(x @ fc1.T) @ fc2.T).cpu().numpy(), mass.cpu().numpy()
