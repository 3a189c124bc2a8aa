"""From firings to figures: one result type, whoever counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

HOT_RATE = 0.5
"""A neuron is hot if it fires on more than this share of tokens."""
COLD_RATE = 0.01
"""A neuron is cold if it fires on less than this share of tokens, but fires."""

MOST_MISSED = 5
"""So many neurons of a layer are named."""

Counts = npt.NDArray[np.int64]
Masses = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Missed:
    """A neuron that its predictor left out though it fired: on how many tokens, and on which share of its firings."""

    neuron: int
    tokens: int
    share: float


@dataclass(frozen=True)
class Prediction:
    """What the engine counted of predictors, each as the counts of h in shape.

    Attributes:
        selected, hit: int64, tokens on which the neuron was selected, and on which it was and fired.
        mass, missed: float64, the sum of its |h|, and of that where it was not selected.
    """

    selected: Counts
    hit: Counts
    mass: Masses
    missed: Masses


@dataclass(frozen=True)
class LayerSparsity:
    """One layer, or one expert of it: shares of tokens and neurons, 0..1, where h, gate or up are not active.

    It also says how many neurons are what.
    `gate` and `up` count values that are not positive, `h` exact zeros. `hot` + `cold` + `never` + the rest = neurons.
    `selected` is the share that the predictor selects, `recall` that of the firing neurons that it selects and `missed`
    that of the sum of |h| that it does not; None without one (the last two where nothing fires, too). `most_missed` are
    the neurons that it most often left out though they fired, the worst first. Of an expert, everything is over the
    tokens that it computed, which are the share `routed` of all; None for a layer with one FFN.
    """

    layer: int
    h: float
    gate: float
    up: float
    hot: int
    cold: int
    never: int
    selected: float | None = None
    recall: float | None = None
    missed: float | None = None
    most_missed: tuple[Missed, ...] = ()
    expert: int | None = None
    routed: float | None = None


@dataclass(frozen=True)
class SparsityReport:
    """A model on a text: `tokens` read, and one entry a layer or expert; all of them have `neurons` neurons."""

    tokens: int
    neurons: int
    layers: tuple[LayerSparsity, ...]

    def mean(self, name: str) -> float:
        """Mean over layers of "h", "gate" or "up", of experts by the tokens that they computed."""
        return _mean(self.layers, name)

    @property
    def predictor(self) -> dict[str, float] | None:
        """Mean `selected`, `recall` and `missed` over the layers that have a predictor; None without one."""
        layers = [layer for layer in self.layers if layer.selected is not None and layer.recall is not None]
        if not layers:
            return None
        return {name: _mean(layers, name) for name in ("selected", "recall", "missed")}

    def to_json(self) -> dict[str, Any]:
        """The JSON object of `analyze`."""
        return {
            "tokens": self.tokens,
            "neurons": self.neurons,
            "sparsity": {name: self.mean(name) for name in ("h", "gate", "up")},
            "predictor": self.predictor,
            "layers": [asdict(layer) for layer in self.layers],
        }


def _mean(layers: Sequence[LayerSparsity], name: str) -> float:
    weights = [1.0 if layer.routed is None else layer.routed for layer in layers]
    return float(np.average([getattr(layer, name) for layer in layers], weights=weights))


def summarise(
    tokens: int,
    gate: Counts,
    up: Counts,
    h: Counts,
    prediction: Prediction | None = None,
    routed: Counts | None = None,
) -> SparsityReport:
    """Reduce firings to a report.

    Args:
        tokens: tokens counted, at least one.
        gate, up, h: int64 [layers, ffn] or [layers, experts, ffn], on how many tokens a neuron had gate > 0, up > 0 and
            h != 0.
        prediction: what predictors said.
        routed: int64 [layers, experts], tokens that each expert computed; one that computed none counts as silent.
    """
    if tokens < 1:
        raise ValueError("nothing was counted")
    layers = []
    for place in np.ndindex(h.shape[:-1]):
        seen = tokens if routed is None else max(int(routed[place]), 1)
        expert = {} if routed is None else {"expert": place[1], "routed": float(routed[place]) / tokens}
        predicted = {} if prediction is None else _predicted(seen, h, prediction, place)
        layers.append(_layer(place[0], seen, gate[place], up[place], h[place], **predicted, **expert))
    return SparsityReport(tokens, h.shape[-1], tuple(layers))


def _layer(
    layer: int,
    tokens: int,
    gate: Counts,
    up: Counts,
    h: Counts,
    **more: Any,
) -> LayerSparsity:
    """One entry, from the counts of its neurons."""
    whole = tokens * len(h)
    return LayerSparsity(
        layer=layer,
        h=1.0 - float(h.sum()) / whole,
        gate=1.0 - float(gate.sum()) / whole,
        up=1.0 - float(up.sum()) / whole,
        hot=int((h > HOT_RATE * tokens).sum()),
        cold=int(((h > 0) & (h < COLD_RATE * tokens)).sum()),
        never=int((h == 0).sum()),
        **more,
    )


def _predicted(tokens: int, h: Counts, prediction: Prediction, place: tuple[int, ...]) -> dict[str, Any]:
    """What an entry says of its predictor; one that never selects counts as none."""
    fired, selected, hit = h[place], prediction.selected[place], prediction.hit[place]
    if not selected.any():
        return {}
    share = {"selected": float(selected.sum()) / (tokens * len(fired))}
    if not fired.any():
        return share
    missed = fired - hit
    worst = [int(neuron) for neuron in np.argsort(-missed, kind="stable")[:MOST_MISSED] if missed[neuron]]
    return {
        **share,
        "recall": float(hit.sum()) / float(fired.sum()),
        "missed": float(prediction.missed[place].sum() / prediction.mass[place].sum()),
        "most_missed": tuple(Missed(one, int(missed[one]), float(missed[one] / fired[one])) for one in worst),
    }
