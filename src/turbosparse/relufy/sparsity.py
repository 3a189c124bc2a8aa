"""Watching and steering which neurons fire while a model trains.

Shapes: B windows, T tokens, F neurons of one FFN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from turbosparse.relufy.recipes import Pressure

_SHARPNESS = 4.0  # how steeply the soft count rises, in standard deviations of the pre-activation


def _openness(pre_BTF: Tensor) -> Tensor:
    """A soft step of a pre-activation, float32 in 0..1: sigmoid(4 x / s), s its standard deviation as a constant."""
    pre_BTF = pre_BTF.float()
    return torch.sigmoid(_SHARPNESS * pre_BTF / (pre_BTF.detach().std() + 1e-6))


def soft_count(gate_BTF: Tensor, up_BTF: Tensor, gate_only: bool = False) -> Tensor:
    """A differentiable stand-in for the share of active neurons: mean of sigmoid(4 g / s_g) * sigmoid(4 u / s_u).

    Args:
        gate_BTF, up_BTF: pre-activations of one FFN, any float dtype.
        gate_only: for ReGLU, where only the gate decides whether a neuron is active.

    Returns:
        float32 scalar in 0..1. s_g and s_u are standard deviations over all tokens and neurons, without gradient, so
        that the penalty cannot be lowered by shrinking the weights. It acts on pre-activations: a neuron that is off
        feels no pull from an L1 penalty on h, but feels this one while it is near its threshold.
    """
    gate = _openness(gate_BTF)
    return gate.mean() if gate_only else (gate * _openness(up_BTF)).mean()


def soft_idle_count(gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
    """The same for idle neurons, the gate open and the up not: mean of sigmoid(4 g / s_g) * sigmoid(-4 u / s_u).

    Exact mode reads their ups for nothing. Both ways out are open, the gate's closing and the up's opening: a gate that
    is pushed alone closes where the neuron fires as well.
    """
    return (_openness(gate_BTF) * (1 - _openness(up_BTF))).mean()


def relative_l1(gate_BTF: Tensor, up_BTF: Tensor, gate_only: bool = False) -> Tensor:
    """L1 norm of h over its root mean square (no gradient through that): float32 scalar, 0 for no active neuron.

    The penalty of ProSparse (arXiv 2402.13516), made independent of the size of h.
    """
    gate, up = torch.relu(gate_BTF.float()), up_BTF.float()
    h = gate * (up if gate_only else torch.relu(up))
    return h.abs().mean() / (h.detach().square().mean().sqrt() + 1e-6)


_PENALTIES = {"count": soft_count, "l1": relative_l1}


class ActivationTap:
    """Hangs on a SparseGLU (`mlp.tap = tap`) and keeps the statistics of its last forward pass.

    `rates`: float32 [3], shares of positive gates, positive ups and non-zero h, without gradient.
    `soft`: what the penalty pushes down, with gradient, or None where no penalty is wanted.
    `soft_idle`: the same of the penalty on idle neurons.
    `stride`: every stride-th token is looked at. Training takes a sample, as each of the three passes over the
    pre-activations that the soft count needs costs memory bandwidth; validation takes them all.
    """

    def __init__(self, activation: str, penalty: str | None, stride: int = 1, idle: bool = False) -> None:
        self.gate_only = activation == "reglu"
        self._penalty, self._idle = _PENALTIES[penalty] if penalty else None, idle
        self.stride = stride
        self.rates: Tensor | None = None
        self.soft: Tensor | None = None
        self.soft_idle: Tensor | None = None

    def __call__(self, gate_BTF: Tensor, up_BTF: Tensor, h_BTF: Tensor) -> None:
        gate_BTF, up_BTF, h_BTF = (x[:, :: self.stride] for x in (gate_BTF, up_BTF, h_BTF.detach()))
        self.rates = torch.stack([on.float().mean() for on in (gate_BTF > 0, up_BTF > 0, h_BTF != 0)])
        self.soft = self._penalty(gate_BTF, up_BTF, self.gate_only) if self._penalty else None
        self.soft_idle = soft_idle_count(gate_BTF, up_BTF) if self._idle else None


def attach_taps(
    mlps: Sequence[nn.Module], penalty: str | None = None, stride: int = 1, idle: bool = False
) -> list[ActivationTap]:
    """Put a tap on every sparse FFN; an empty list for a dense model (a SwiGLU control has no exact zeros)."""
    if not all(hasattr(mlp, "tap") for mlp in mlps):
        return []
    taps = [ActivationTap(mlp.activation, penalty, stride, idle) for mlp in mlps]  # type: ignore[arg-type]
    for mlp, tap in zip(mlps, taps, strict=True):
        mlp.tap = tap  # type: ignore[assignment]
    return taps


@dataclass
class SparsityPressure:
    """Turns a measured rate, of active or of idle neurons, into the weight of its penalty: a proportional controller.

    The target falls linearly from `start_rate` to `target_rate` over the first `ramp` of the stage. The penalty is off
    while the rate is at the target and reaches `weight` at `target + width`, so that the rate settles just above the
    target, whatever the weight, instead of wherever a fixed penalty happens to push it.
    """

    settings: Pressure

    def target(self, progress: float) -> float:
        """The rate aimed at, 0..1, at `progress` 0..1 through the stage."""
        s = self.settings
        done = min(1.0, progress / s.ramp) if s.ramp > 0 else 1.0
        return s.start_rate + (s.target_rate - s.start_rate) * done

    def __call__(self, rate: Tensor, soft: Tensor, progress: float) -> Tensor:
        """The penalty to add to the loss, scalar; no host synchronisation.

        Args:
            rate: measured share of these neurons, mean over layers, scalar.
            soft: soft count, mean over layers, scalar with gradient.
            progress: 0..1.
        """
        excess = (rate.detach() - self.target(progress)) / self.settings.width
        return self.settings.weight * excess.clamp(0.0, 1.0) * soft
