"""Gates of three values a row: cheap enough to read that they need no predictor.

Which neurons fire is decided by the gate, so exact mode reads all of it: a third of an FFN, and most of what is left
once ups and downs are sparse. With weights of -s, 0 or s, one s a row, the gate takes 2 bits a weight instead of 4.5,
and it is no guess. It is the form of Ternary Weight Networks (Li and Liu 2016, arXiv 1605.04711): zero below 0.7 times
the row's mean magnitude, s the mean magnitude of the others.

Shapes: F neurons, D hidden.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from turbosparse.relufy.objective import ffns
from turbosparse.relufy.rounded import RoundedLinear

_ZERO_BELOW = 0.7  # of the mean magnitude: nearly the least squares error for weights of a normal distribution


def ternary(weight_FD: Tensor) -> Tensor:
    """Each row rounded to -s, 0 and s; a row that has this form already stays as it is. A row of zeros stays zero."""
    magnitude_FD = weight_FD.abs()
    kept_FD = magnitude_FD > _ZERO_BELOW * magnitude_FD.mean(1, keepdim=True)
    scale_F1 = (magnitude_FD * kept_FD).sum(1, keepdim=True) / kept_FD.sum(1, keepdim=True).clamp(min=1)
    return weight_FD.sign() * kept_FD * scale_F1


class TernaryGate(RoundedLinear):
    """A gate projection of three values a row."""

    rounded = staticmethod(ternary)


def use_ternary_gates(model: Any) -> None:
    """Make the gate of every FFN of a sparse model a TernaryGate, in place and before it is compiled."""
    for mlp in ffns(model):
        mlp.gate_proj.__class__ = TernaryGate
