"""What the engine counts and times while it runs, as the native module hands it over."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from turbosparse import _native
from turbosparse.model.config import ModelConfig

Counts = npt.NDArray[np.int64]
Masses = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ActivationCounts:
    """On how many of `tokens` tokens each neuron fired: int64 [layers, ffn], with experts [layers, experts, ffn].

    Attributes:
        tokens: that were read.
        gate, up, h: gate > 0, up > 0 and h != 0.
        selected, hit: selected by the predictor, and both selected and h != 0; None for a file without one. The recall
            of a layer is hit.sum() / h.sum().
        mass, missed: the sum of a neuron's |h|, and of that where the predictor did not select it, float64 in the same
            shape; None for a file without one.
        routed: how many tokens each expert computed, int64 [layers, experts]; None without experts.
    """

    tokens: int
    gate: Counts
    up: Counts
    h: Counts
    selected: Counts | None = None
    hit: Counts | None = None
    mass: Masses | None = None
    missed: Masses | None = None
    routed: Counts | None = None


@dataclass(frozen=True)
class Traffic:
    """What decoding cost: tokens, bytes of weights read for them, and shares of neurons (0..1, None without tokens).

    `active` is the share of neurons with h != 0 and `open` that with a positive gate, of those that were computed; both
    are None for a dense model. `selected` is the share that predictors selected, None where none did. What several
    sequences need together is read once and counts once.
    """

    tokens: int
    bytes: int
    active: float | None
    open: float | None
    selected: float | None = None

    @property
    def sparsity(self) -> float | None:
        """Share of exact zeros in h, and of neurons that a predictor took for silent."""
        return None if self.active is None else 1.0 - self.active


@dataclass(frozen=True)
class PhaseTime:
    """What a phase of decoding took (phases.h names them), summed over tokens.

    Attributes:
        seconds: on the wall, the mean of the threads.
        waited: those of them that were spent at barriers: threads that were done before others.
        bytes: of weights, and in attention of keys and values, that all threads read.
    """

    seconds: float
    waited: float
    bytes: int


def read_counts(model: _native.Model, config: ModelConfig, reset: bool) -> ActivationCounts:
    """What was counted since counting began or since the last reset."""
    ffns = config.n_layers * config.ffns
    routed = np.empty(ffns, np.int64)
    gate, up, h, selected, hit = (np.empty(ffns * config.ffn_size, np.int64) for _ in range(5))
    mass, missed = (np.empty(ffns * config.ffn_size, np.float64) for _ in range(2))
    tokens = model.read_counts(routed, gate, up, h, selected, hit, mass, missed, reset)
    shape = (config.n_layers, *((config.experts,) if config.experts else ()))
    gate, up, h, selected, hit = (array.reshape(*shape, config.ffn_size) for array in (gate, up, h, selected, hit))
    mass, missed = (array.reshape(*shape, config.ffn_size) for array in (mass, missed))
    counts = ActivationCounts(tokens, gate, up, h, routed=routed.reshape(shape) if config.experts else None)
    if config.predictor is None:
        return counts
    return dataclasses.replace(counts, selected=selected, hit=hit, mass=mass, missed=missed)


def read_traffic(model: _native.Model, config: ModelConfig, reset: bool) -> Traffic:
    """What decoding cost since the model was made or since the last reset."""
    tokens, read, *counted = model.read_traffic(reset)
    neurons = tokens * config.n_layers * config.ffns_used * config.ffn_size
    if not (config.sparse and neurons > 0):
        return Traffic(tokens, read, None, None)
    active, opened, selected = (count / neurons for count in counted)
    return Traffic(tokens, read, active, opened, selected or None)


def read_phases(model: _native.Model, reset: bool) -> dict[str, PhaseTime]:
    """What each phase took while it was timed, or since the last reset."""
    phases = model.read_phases(reset)
    return {name: PhaseTime(seconds, waited, read) for name, seconds, waited, read in phases}
