"""Gates of three values a row: cheap enough to read that they need no predictor.

Which neurons fire is decided by the gate, so exact mode reads all of it: a third of an FFN, and most of what is left
once ups and downs are sparse. With weights of -s, 0 or s, one s a row, the gate takes 2 bits a weight instead of 4.5,
and it is no guess. It is the form of Ternary Weight Networks (Li and Liu 2016, arXiv 1605.04711): zero below 0.7 times
the row's mean magnitude, s the mean magnitude of the others. A full-precision copy is what learns, by the gradient of
the rounded one (the straight-through estimator, as in BitNet b1.58, arXiv 2402.17764).

Shapes: F neurons, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from turbosparse.relufy.objective import ffns

_ZERO_BELOW = 0.7  # of the mean magnitude: nearly the least squares error for weights of a normal distribution


def ternary(weight_FD: Tensor) -> Tensor:
    """Each row rounded to -s, 0 and s; a row that has this form already stays as it is. A row of zeros stays zero."""
    magnitude_FD = weight_FD.abs()
    kept_FD = magnitude_FD > _ZERO_BELOW * magnitude_FD.mean(1, keepdim=True)
    scale_F1 = (magnitude_FD * kept_FD).sum(1, keepdim=True) / kept_FD.sum(1, keepdim=True).clamp(min=1)
    return weight_FD.sign() * kept_FD * scale_F1


class _StraightThrough(torch.autograd.Function):
    """ternary(weight), with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, weight_FD: Tensor) -> Tensor:
        return ternary(weight_FD)

    @staticmethod
    def backward(ctx: Any, grad_FD: Tensor) -> Tensor:
        return grad_FD


class TernaryGate(nn.Linear):
    """A gate projection in training: `weight` is the full-precision copy, what is computed is its ternary form."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., D] to [..., F]."""
        return F.linear(x, _StraightThrough.apply(self.weight), self.bias)


def use_ternary_gates(model: Any) -> None:
    """Make the gate of every FFN of a sparse model a TernaryGate, in place and before it is compiled."""
    for mlp in ffns(model):
        mlp.gate_proj.__class__ = TernaryGate


@torch.no_grad()
def settle_ternary_gates(model: Any) -> None:
    """End the training: gates become plain projections again, with the ternary weights that they computed with."""
    for mlp in ffns(model):
        mlp.gate_proj.weight.copy_(ternary(mlp.gate_proj.weight))
        mlp.gate_proj.__class__ = nn.Linear
