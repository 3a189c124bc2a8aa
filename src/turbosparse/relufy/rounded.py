"""Weights that train as a file will hold them: rounded where they compute, in full precision where they learn.

Rounding has no slope, so the full-precision copy takes the gradient of the rounded one as its own (the straight-through
estimator, Bengio et al. 2013, arXiv 1308.3432; for weights of few bits, BitNet b1.58, arXiv 2402.17764).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _StraightThrough(torch.autograd.Function):
    """The second tensor, with its gradient handed to the first."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()  # autograd wants an output that is no input; a compiler leaves the copy out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def straight_through(weight: Tensor, rounded: Tensor) -> Tensor:
    """`rounded` bit for bit, and its gradient is that of `weight`; both of one shape and dtype."""
    result: Tensor = _StraightThrough.apply(weight, rounded)
    return result


class RoundedLinear(nn.Linear):
    """A projection in training: `weight` is the full-precision copy, what is computed is `rounded(weight)`.

    Subclasses say how they round. A projection becomes one by its class (`linear.__class__ = ...`), before it is
    compiled, so that names of weights stay as they are.
    """

    @staticmethod
    @abstractmethod
    def rounded(weight_FD: Tensor) -> Tensor:
        """What the file will hold of a float32 weight, [F, D] as it is."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., D] to [..., F]."""
        return F.linear(x, straight_through(self.weight, self.rounded(self.weight.detach())), self.bias)


@torch.no_grad()
def settle_rounded(model: Any) -> None:
    """End the training: rounded projections become plain ones again, with the weights that they computed with."""
    for module in model.modules():
        if isinstance(module, RoundedLinear):
            module.weight.copy_(module.rounded(module.weight))
            module.__class__ = nn.Linear  # type: ignore[assignment]
