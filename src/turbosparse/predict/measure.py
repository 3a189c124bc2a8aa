"""What a predictor keeps and costs at every threshold, on tokens that it was not fitted on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from turbosparse.predict.bins import Bins
from turbosparse.predict.fit import Tokens, nats

_ROWS = 256  # tokens at once, in the core's cache
_ROWS_ON_DEVICE = 8192  # tokens at once, elsewhere
_SOME = 8  # of so many tokens, one says where scores lie
_BINS = 1 << 12

Floats = npt.NDArray[np.float64]
Scores = Callable[[Tensor], Tensor]  # of an FFN's inputs, float32 [tokens, hidden]: float32 [tokens, ffn]


def low_rank(fc1: Tensor, fc2: Tensor) -> Scores:
    """fc2 relu(fc1 x), on the device of the matrices, [rank, hidden] and [ffn, rank]."""
    return lambda x: torch.relu(x @ fc1.T) @ fc2.T


def by_gate(gate: Tensor, neurons: int) -> Scores:
    """The gate itself, of its weight [gates, hidden]; each serves so many neurons."""
    return lambda x: (x @ gate.T).repeat_interleave(neurons, -1)


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
        nats_lost: what the neurons that fire and are not selected cost, each by itself (sensitivity.py), a token.
    """

    layer: int
    rank: int
    bytes_share: float
    mass_kept: float
    recall: float
    selected: float
    active: float
    nats_lost: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Curve:
    """What the neurons of a layer at and above each of some scores are, per token.

    Attributes:
        score: the thresholds, float32 [bins], ascending.
        sums: float64 [4, bins], the number of these neurons and of those of them that fire, their |h| and their nats.
        whole: float64 [4], the same of all neurons.
    """

    score: npt.NDArray[np.float32]
    sums: Floats
    whole: Floats

    @property
    def mass(self) -> Floats:
        """The share of |h| that is kept, [bins]."""
        kept: Floats = self.sums[2] / self.whole[2] if self.whole[2] else np.ones_like(self.sums[2])
        return kept

    def best(self, price: float) -> int:
        """Index of the threshold to take where selecting a neuron costs `price` nats: the highest of the best."""
        gain = self.sums[3] - price * self.sums[0]
        return int(np.flatnonzero(gain == gain.max())[-1])

    def quality(self, index: int, layer: int, rank: int, bytes_share: float) -> LayerQuality:
        """The predictor at a threshold."""
        selected, hit, _, kept = self.sums[:, index]
        neurons, active, _, nats_in_all = self.whole
        return LayerQuality(
            layer=layer,
            rank=rank,
            bytes_share=bytes_share,
            mass_kept=float(self.mass[index]),
            recall=float(hit / active) if active else 1.0,
            selected=float(selected / active) if active else 0.0,
            active=float(active / neurons),
            nats_lost=float(nats_in_all - kept),
        )


def edges(tokens: Tokens, scores: Scores, device: torch.device) -> npt.NDArray[np.float32]:
    """Thresholds to try: the lowest score, and others with as many scores between each two of them."""
    lowest, some = np.inf, []
    for score, _ in _scored(tokens, scores, device):
        lowest = min(lowest, float(score.min()))
        some.append(score[::_SOME].reshape(-1))
    found = torch.cat(some)
    # On a CPU, torch's own sort takes eight times as long: it keeps track of places too.
    ordered = torch.from_numpy(np.sort(found.numpy())) if found.device.type == "cpu" else found.sort().values
    at = (torch.linspace(0, 1, _BINS, dtype=torch.float64) * (len(ordered) - 1)).long()
    return np.unique(np.append(ordered[at.to(ordered.device)].cpu().numpy(), lowest).astype(np.float32))


def curve(tokens: Tokens, scores: Scores, worth: Tensor, tried: npt.NDArray[np.float32]) -> Curve:
    """The curve of a predictor over the thresholds `tried`; `worth` [ffn] is what its neurons cost (fit.nats).

    Computed where `worth` lies, which is where the predictor does.
    """
    borders = Bins(torch.from_numpy(tried).to(worth.device))
    counted = torch.zeros(4, len(tried) + 1, dtype=torch.float64, device=worth.device)
    for score, mass in _scored(tokens, scores, worth.device):
        bins = borders.of(score.reshape(-1))  # 0: below them all
        for kind, weights in enumerate((torch.ones_like(mass), mass > 0, mass, nats(mass, worth))):
            counted[kind] += torch.bincount(bins, weights.reshape(-1).double(), len(tried) + 1)
    per_token = counted.cpu().numpy() / len(tokens.x)
    sums = per_token[:, :0:-1].cumsum(1)[:, ::-1]
    return Curve(tried, sums, sums[:, 0] + per_token[:, 0])


def _scored(tokens: Tokens, scores: Scores, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """(scores, mass), float32 [some tokens, ffn], of all tokens."""
    rows = _ROWS if device.type == "cpu" else _ROWS_ON_DEVICE
    with torch.inference_mode():
        for start in range(0, len(tokens.x), rows):
            x, mass = tokens.batch(slice(start, start + rows), device)
            yield scores(x), mass
