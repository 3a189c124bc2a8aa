"""Gates and ups that a low-rank predictor can guess, and that predictor: for models with random weights.

The neurons of a layer share a few random directions. Neuron i has gate direction j(i), up direction k(i) (drawn once)
and a little noise of its own, so it fires about where both of its directions are positive. The predictor's `fc1` holds
all directions with their sign turned, and row i of `fc2` takes relu(-gate j) + relu(-up k) off the score: 0 where both
are positive, less the further they are from it. A threshold below zero selects those that fire, but for the noise, and
some more. The matrices are as much work to read and multiply as trained ones; that `fc2` is mostly zeros saves nothing.

Of mirrored ups both signs are needed, so `fc1` holds these directions as they are, too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

from turbosparse.errors import UserError
from turbosparse.model.config import ModelConfig, rank_at
from turbosparse.model.quantize import dequantize, negate
from turbosparse.model.synthetic_rows import Rows, few_levels, random_rows

_RANKS = 32  # the width of a predictor is a multiple of this, so that rows of fc2 are whole blocks
_NOISE = 0.005  # share of a neuron's weights that are its own: moves a gate by sqrt(2 * 0.005) = 0.1 of its spread
_PROBES = 256  # tokens and
_PROBED = 4096  # neurons that set the threshold


@dataclass(frozen=True)
class Prediction:
    """What a synthetic predictor is like.

    Attributes:
        selected: neurons that it selects, over those that fire; at least 1.
        share: its bytes over those of the FFN, 0..1.
    """

    selected: float = 1.2
    share: float = 0.06

    def __post_init__(self) -> None:
        if not 1.0 <= self.selected < math.inf:
            raise UserError(f"--selected {self.selected:g}: it must be at least 1, all that fire.")
        if not 0.0 < self.share <= 1.0:
            raise UserError(f"--predictor-share {self.share:g}: it must be over 0 and at most 1; 0 is without one.")


def predictor_ranks(config: ModelConfig, share: float) -> tuple[int, ...]:
    """Widths of the layers' predictors: multiples of 32 whose sum comes nearest to `share` of the FFN's bytes."""
    per_gate, per_up = config.neurons_per_gate, config.neurons_per_up
    exact = rank_at(share, config.hidden_size, config.ffn_size, per_gate, per_up) / _RANKS
    ends = [round(exact * layer) for layer in range(config.n_layers + 1)]
    return tuple(_RANKS * max(1, end - start) for start, end in pairwise(ends))


class Directions:
    """The directions of one layer, half of them of gates and half of ups, and which neuron has which.

    Args:
        seed: of the layer.
        rank: how many directions; those of mirrored ups count twice.
        kind: type of the matrices.
        gate, up: statistics of the rows, with a width of `columns`.
        neurons: of the layer.
        per_gate: neurons next to each other that share a gate.
        mirrored_ups: two of them share an up, with opposite signs.
    """

    def __init__(
        self,
        seed: tuple[int, ...],
        rank: int,
        columns: int,
        kind: Type,
        gate: Rows,
        up: Rows,
        neurons: int,
        per_gate: int = 1,
        mirrored_ups: bool = False,
    ) -> None:
        self._rng = np.random.Generator(np.random.SFC64(seed))
        self._kind, self._columns, self._mirrored = kind, columns, mirrored_ups
        self._rows = {"gate": gate, "up": up}
        self._neurons_per_row = {"gate": per_gate, "up": 2 if mirrored_ups else 1}
        self._count = {"gate": rank // 2, "up": rank // 2 // self._neurons_per_row["up"]}
        self._stored = {
            name: random_rows(self._rng, (self._count[name], columns), kind, rows) for name, rows in self._rows.items()
        }
        self._chosen = {
            name: self._rng.integers(self._count[name], size=neurons // group)
            for name, group in self._neurons_per_row.items()
        }

    def matrix(self, name: str, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Some rows of "gate" or "up" as they are stored, uint8 [stop - start, bytes of a row]."""
        rows = self._stored[name][self._chosen[name][start:stop]]
        own = random_rows(self._rng, (stop - start, self._columns), self._kind, self._rows[name])
        mask = self._rng.random(rows.shape, np.float32) < _NOISE
        unit = 2 if self._kind is Type.F16 else 4 if self._kind is Type.F32 else 1
        mask = np.repeat(mask[:, ::unit], unit, axis=1)  # whole numbers; scales are equal everywhere
        return np.where(mask, own, rows)

    def fc1(self) -> npt.NDArray[np.uint8]:
        """All directions with their sign turned; behind them mirrored ups as they are."""
        turned = [negate(rows, self._kind) for rows in self._stored.values()]
        return np.concatenate([*turned, self._stored["up"]] if self._mirrored else turned)

    def fc2(self, start: int, stop: int, kind: Type) -> npt.NDArray[np.uint8]:
        """Rows of some neurons: -1 where its two directions are."""
        rows = np.zeros((stop - start, 2 * self._count["gate"]), np.int8)
        every = np.arange(stop - start)
        rows[every, self._of_neurons("gate", start, stop)] = -1
        other_sign = self._count["up"] * (self._signs(start, stop) < 0)
        rows[every, self._count["gate"] + other_sign + self._of_neurons("up", start, stop)] = -1
        return few_levels(rows, 1.0, kind)

    def threshold(self, x: npt.NDArray[np.float32], selected: float) -> float:
        """The score that selects `selected` times as many neurons as fire; x are inputs, float32 [tokens, columns]."""
        gate, up = (
            x @ dequantize(stored.reshape(-1), self._kind, (self._count[name], self._columns)).T
            for name, stored in self._stored.items()
        )
        probed = min(_PROBED, len(self._chosen["up"]) * self._neurons_per_row["up"])
        gate = gate[:, self._of_neurons("gate", 0, probed)]
        up = up[:, self._of_neurons("up", 0, probed)] * self._signs(0, probed)
        score = np.minimum(gate, 0.0) + np.minimum(up, 0.0)
        wanted = min(1.0, selected * float(((gate > 0) & (up > 0)).mean()))
        return float(np.float32(np.quantile(score, 1.0 - wanted)))

    def _of_neurons(self, name: str, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Which direction each of some neurons has."""
        return self._chosen[name][np.arange(start, stop) // self._neurons_per_row[name]]

    def _signs(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """1, or -1 for those of some neurons that have their up's direction with the other sign."""
        odd = np.arange(start, stop) % self._neurons_per_row["up"] > 0
        return np.where(odd, -1, 1).astype(np.float32)


def probes(rng: np.random.Generator, columns: int, kind: Type, rows: Rows) -> npt.NDArray[np.float32]:
    """Inputs of an FFN as random tokens give them, float32 [tokens, columns]; `kind` and `rows` are the embedding's."""
    stored = random_rows(rng, (_PROBES, columns), kind, rows)
    x = dequantize(stored.reshape(-1), kind, (_PROBES, columns))
    x /= np.sqrt(np.square(x).mean(axis=1, keepdims=True))
    return x
