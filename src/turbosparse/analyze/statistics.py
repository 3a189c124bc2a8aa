"""From firings to figures: one result type, whoever counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

HOT_RATE = 0.5
"""A neuron is hot if it fires on more than this share of tokens."""
COLD_RATE = 0.01
"""A neuron is cold if it fires on less than this share of tokens, but fires."""

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LayerSparsity:
    """One layer: shares of tokens and neurons, 0..1, where h, gate or up are not active; and how many neurons are what.

    `gate` and `up` count values that are not positive, `h` exact zeros. `hot` + `cold` + `never` + the rest = neurons.
    `selected` is the share that the predictor selects and `recall` that of the firing neurons that it selects; None
    without one (and `recall` where nothing fires).
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


@dataclass(frozen=True)
class SparsityReport:
    """A model on a text: `tokens` read, and one entry a layer; all layers have `neurons` neurons."""

    tokens: int
    neurons: int
    layers: tuple[LayerSparsity, ...]

    def mean(self, name: str) -> float:
        """Mean over layers of "h", "gate" or "up"."""
        return float(np.mean([getattr(layer, name) for layer in self.layers]))

    @property
    def predictor(self) -> dict[str, float] | None:
        """Mean `selected` and `recall` over the layers that have a predictor; None without one."""
        layers = [layer for layer in self.layers if layer.selected is not None and layer.recall is not None]
        if not layers:
            return None
        return {name: float(np.mean([getattr(layer, name) for layer in layers])) for name in ("selected", "recall")}

    def to_json(self) -> dict[str, Any]:
        """The JSON object of `analyze`."""
        return {
            "tokens": self.tokens,
            "neurons": self.neurons,
            "sparsity": {name: self.mean(name) for name in ("h", "gate", "up")},
            "predictor": self.predictor,
            "layers": [vars(layer) for layer in self.layers],
        }


def summarise(
    tokens: int, gate: Counts, up: Counts, h: Counts, selected: Counts | None = None, hit: Counts | None = None
) -> SparsityReport:
    """Reduce firings to a report.

    Args:
        tokens: tokens counted, at least one.
        gate, up, h: int64 [layers, ffn], on how many tokens a neuron had gate > 0, up > 0 and h != 0.
        selected, hit: the same, selected by a predictor, and both selected and h != 0.
    """
    if tokens < 1:
        raise ValueError("nothing was counted")
    neurons = h.shape[1]
    layers = [
        LayerSparsity(
            layer=index,
            h=1.0 - float(h[index].sum()) / (tokens * neurons),
            gate=1.0 - float(gate[index].sum()) / (tokens * neurons),
            up=1.0 - float(up[index].sum()) / (tokens * neurons),
            hot=int((h[index] > HOT_RATE * tokens).sum()),
            cold=int(((h[index] > 0) & (h[index] < COLD_RATE * tokens)).sum()),
            never=int((h[index] == 0).sum()),
            **_prediction(tokens, h, selected, hit, index),
        )
        for index in range(h.shape[0])
    ]
    return SparsityReport(tokens, neurons, tuple(layers))


def _prediction(
    tokens: int, h: Counts, selected: Counts | None, hit: Counts | None, layer: int
) -> dict[str, float | None]:
    """`selected` and `recall` of a layer; a layer whose predictor never selects counts as one without."""
    if selected is None or hit is None or not selected[layer].any():
        return {}
    fired = int(h[layer].sum())
    share = float(selected[layer].sum()) / (tokens * h.shape[1])
    return {"selected": share, "recall": float(hit[layer].sum()) / fired if fired else None}
