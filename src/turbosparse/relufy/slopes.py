"""Let neurons that are off learn: training with a softer slope than that of what is computed.

relu passes no gradient where it is zero, so a neuron that is off learns nothing from a token, not even that it would
have helped; at 90 % zeros that is most of what happens. Spiking networks have the same trouble and take the slope of a
smooth function in the backward pass (Neftci et al. 2019, arXiv 1901.09948), Q-Sparse (arXiv 2407.10969) that of no
function at all. What is computed, and so the model, stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from turbosparse.errors import UserError
from turbosparse.relufy.drelu import SparseGLU
from turbosparse.relufy.objective import ffns

_SHARPNESS = 4.0  # 2 is worse: docs/experiments.md, 2026-11-26
_STRIDE = 8  # tokens between those that the standard deviation is taken from


class _WithSlope(torch.autograd.Function):
    """`value` bit for bit, with the gradient of `smooth`.

    Not smooth + (value - smooth).detach(): a compiler that contracts its products and sums leaves rounding errors
    where value is zero, and a neuron that is off seems to fire.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, smooth: Tensor) -> Tensor:
        ctx.dtype = smooth.dtype
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad.to(ctx.dtype)


def with_slope(value: Tensor, smooth: Tensor) -> Tensor:
    """`value`, with the gradient of `smooth`."""
    result: Tensor = _WithSlope.apply(value, smooth)
    return result


def soft_relu(x_BTF: Tensor) -> Tensor:
    """relu(x) with the slope of a softplus, sigmoid(4 x / s), where s is the standard deviation of all x."""
    steep = _SHARPNESS / (x_BTF[:, ::_STRIDE].detach().float().std() + 1e-6).to(x_BTF.dtype)
    return with_slope(torch.relu(x_BTF), F.softplus(x_BTF * steep) / steep)


class SoftSlopeGLU(SparseGLU):
    """A SparseGLU in training: pre-activations below zero pass a gradient, and so does h below its threshold."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, T, d] to [B, T, d]."""
        if not torch.is_grad_enabled():
            return super().forward(x)
        gate, up = self.gate_proj(x), self.up_proj(x)
        h = self._combine(gate, up)
        if self.threshold is not None:
            h = torch.where(h.abs() < self.threshold, 0.0, h)
        h = with_slope(h, soft_relu(gate) * (up if self.activation == "reglu" else soft_relu(up)))
        if self.tap is not None:
            self.tap(gate, up, h)
        y: Tensor = self.down_proj(h)
        return y


def use_soft_slopes(model: Any) -> None:
    """Make every sparse FFN of a model a SoftSlopeGLU, in place and before it is compiled.

    Raises:
        UserError: the model is dense.
    """
    blocks = ffns(model)
    if not all(isinstance(mlp, SparseGLU) for mlp in blocks):
        raise UserError("`soft_slopes` is for sparse models; convert the model first, or leave it out")
    for mlp in blocks:
        mlp.__class__ = SoftSlopeGLU
