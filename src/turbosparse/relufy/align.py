"""Choose, for every neuron, which side of its up projection dReLU keeps.

A gated neuron does not change when its row of up and its column of down change sign together. dReLU keeps only the side
where up is positive, so of the two signs, which were the same to the dense model, one loses less. Half of a model's
neurons have the wrong one, and training does not turn them round: from the better side it ends at a lower error.

Shapes: B windows, T tokens, D hidden, F neurons of one FFN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from turbosparse.relufy.objective import ffns, last_hidden


class _Sides:
    """How much of a neuron's dense activation h = act(gate) * up each side of up explains, on the teacher's inputs.

    With p = relu(gate) * relu(+-up) the best multiple of p explains <h, p>^2 / <p, p> of the energy of h.
    """

    def __init__(self, mlp: Any, act: Callable[[Tensor], Tensor]) -> None:
        self.mlp, self._act = mlp, act
        neurons, device = mlp.up_proj.weight.shape[0], mlp.up_proj.weight.device
        self._products = torch.zeros((2, 2, neurons), device=device)  # side, (<h, p>, <p, p>), neuron

    def add(self, x_BTD: Tensor) -> None:
        x_ND = x_BTD.flatten(0, -2)
        gate_NF, up_NF = self.mlp.gate_proj(x_ND).float(), self.mlp.up_proj(x_ND).float()
        h_NF = self._act(gate_NF) * up_NF
        for side, sign in enumerate((1.0, -1.0)):
            p_NF = torch.relu(gate_NF) * torch.relu(sign * up_NF)
            self._products[side] += torch.stack([(h_NF * p_NF).sum(0), p_NF.square().sum(0)])

    def turn(self) -> Tensor:
        """Turn the neurons whose other side explains more; returns which, bool [F]."""
        explained = self._products[:, 0].square() / self._products[:, 1].clamp_min(1e-20)
        turned_F = explained[1] > explained[0]
        sign_F = torch.where(turned_F, -1.0, 1.0)
        self.mlp.up_proj.weight *= sign_F[:, None]
        if self.mlp.up_proj.bias is not None:
            self.mlp.up_proj.bias *= sign_F
        self.mlp.down_proj.weight *= sign_F
        return turned_F


@torch.no_grad()
def align_signs(student: Any, teacher: Any, batches: Iterable[Tensor], dtype: torch.dtype | None = None) -> float:
    """Turn neurons of a freshly swapped student, in place, so that dReLU keeps the side that matters.

    Args:
        student: a dReLU model with the teacher's weights. One that was trained as dReLU would be broken by this.
        teacher: the dense model it was made from; its activation and hidden states are used.
        batches: int64 [B, T] token ids; some ten thousand tokens are enough.
        dtype: of the residual stream, as in last_hidden.

    Returns:
        the share of neurons turned, 0..1; about a half, as the signs of a dense model are arbitrary.
    """
    teachers: list[Any] = list(ffns(teacher))
    sides = [_Sides(mlp, dense.act_fn) for mlp, dense in zip(ffns(student), teachers, strict=True)]

    def watch(layer: _Sides) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _module, inputs, _output: layer.add(inputs[0])

    hooks = [mlp.register_forward_hook(watch(layer)) for mlp, layer in zip(teachers, sides, strict=True)]
    try:
        for ids_BT in batches:
            last_hidden(teacher, ids_BT, dtype)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack([layer.turn() for layer in sides]).float().mean().item()
