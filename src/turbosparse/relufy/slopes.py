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

from turbosparse.errors import UserError
from turbosparse.relufy.drelu import SparseGLU
from turbosparse.relufy.objective import ffns

_SHARPNESS = 4.0  # 2 is worse: docs/experiments.md, 2026-11-26
_STRIDE = 8  # tokens between those that the standard deviation is taken from


class _SoftSlopes(torch.autograd.Function):
    """`h` bit for bit, with the gradient of relu(gate) * relu(up), or relu(gate) * up, whose relus have soft slopes.

    h is handed in as it is, not as smooth + (h - smooth).detach(): a compiler that contracts its products and sums
    leaves rounding errors where h is zero, and a neuron that is off seems to fire. The gradient is written out, so that
    only the pre-activations are kept for it, in their own dtype: autocast would compute a softplus in float32.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, gate: Tensor, up: Tensor, both: bool) -> Tensor:
        ctx.save_for_backward(gate, up, _steepness(gate), _steepness(up) if both else None)
        return h.clone()  # autograd wants an output that is no input; a compiler leaves the copy out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor, None]:
        gate, up, gate_steep, up_steep = ctx.saved_tensors
        by_gate = torch.sigmoid(gate * gate_steep) * (up if up_steep is None else torch.relu(up))
        by_up = torch.relu(gate) if up_steep is None else torch.relu(gate) * torch.sigmoid(up * up_steep)
        return None, grad * by_gate, grad * by_up, None


def _steepness(x_BTF: Tensor) -> Tensor:
    """Of the sigmoid that stands for the step of relu(x): a scalar of x's dtype."""
    return (_SHARPNESS / (x_BTF[:, ::_STRIDE].float().std() + 1e-6)).to(x_BTF.dtype)


def with_soft_slopes(h_BTF: Tensor, gate_BTF: Tensor, up_BTF: Tensor, both: bool) -> Tensor:
    """`h`, with gradients for its pre-activations also where it is zero; all [B, T, F], of one float dtype.

    Args:
        h_BTF: what the FFN computes from the other two, without a gradient of its own.
        gate_BTF: pre-activations, which have a relu.
        up_BTF: pre-activations, which have a relu if `both`.
        both: True for dReLU, False for ReGLU.
    """
    result: Tensor = _SoftSlopes.apply(h_BTF, gate_BTF, up_BTF, both)
    return result


class SoftSlopeGLU(SparseGLU):
    """A SparseGLU in training: pre-activations below zero pass a gradient, and so does h below its threshold."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, T, d] to [B, T, d]."""
        if not torch.is_grad_enabled():
            return super().forward(x)
        gate, up = self.gates(x), self.ups(x)
        h = with_soft_slopes(self.hidden(gate.detach(), up.detach()), gate, up, self.activation == "drelu")
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
