"""Choose which neurons a dReLU model starts with.

A dense neuron h = act(gate) * up works on all four sides of (gate, up), a dReLU neuron on one. But signs can be moved:
relu(+-gate) * relu(+-up) * c, with any signs and a factor c, stands for one side of the dense neuron. So every dense
neuron offers four, and a layer takes those that explain most of its output for how often they fire, as many as it is to
have neurons: important ones get two sides or more, others none. A layer that is wider than the dense one loses less by
the swap, and little where it has all sides.

Two sides of a neuron that differ in the sign of up have the same gate. In pairs they share it: the layer keeps so many
gates, each with both of its sides, and grows by ups and downs alone, of which little is read for a token. They have the
same up as well, but for its sign. Mirrored pairs go on sharing it: they grow by downs alone, and no up is read in vain.

Shapes: B windows, T tokens, D hidden, F neurons of one FFN, G gates, S = 4 sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from turbosparse.relufy.objective import ffns, last_hidden
from turbosparse.relufy.quantized import BLOCK

_SIGNS = ((1.0, 1.0), (1.0, -1.0), (-1.0, 1.0), (-1.0, -1.0))  # of gate and up; both signs of up side by side
PAIR = 2  # sides of one gate
PAIRED = ("pairs", "mirrored")  # choices of sides whose gates have both
_RARE = 0.05  # of the tokens: firing less often than this hardly counts in favour of a side


class _Sides:
    """How much of a layer's output each side of each neuron explains, on the teacher's inputs.

    With p = relu(+-gate) * relu(+-up), the best multiple of p for h is c = <h, p> / <p, p>, and it explains
    <h, p>^2 / <p, p> of the energy of h, which the neuron's column of down makes longer or shorter.
    """

    def __init__(self, mlp: Any, act: Callable[[Tensor], Tensor]) -> None:
        self.mlp, self._act = mlp, act
        neurons, device = mlp.up_proj.weight.shape[0], mlp.up_proj.weight.device
        self._products = torch.zeros((2, len(_SIGNS), neurons), device=device)  # <h, p> and <p, p>
        self._fires = torch.zeros((len(_SIGNS), neurons), device=device)
        self._tokens = 0

    def add(self, x_BTD: Tensor) -> None:
        x_ND = x_BTD.flatten(0, -2)
        gate_NF, up_NF = self.mlp.gate_proj(x_ND).float(), self.mlp.up_proj(x_ND).float()
        h_NF = self._act(gate_NF) * up_NF
        for side, (gate_sign, up_sign) in enumerate(_SIGNS):
            p_NF = torch.relu(gate_sign * gate_NF) * torch.relu(up_sign * up_NF)
            self._products[:, side] += torch.stack([(h_NF * p_NF).sum(0), p_NF.square().sum(0)])
            self._fires[side] += (p_NF > 0).sum(0)
        self._tokens += x_ND.shape[0]

    def choose(self, sides: str, neurons: int) -> Tensor:
        """Rewrite the layer's neurons as so many of the best sides; returns how many each dense one got, int64 [F].

        `sides` as of allot_neurons.
        """
        hp_SF, pp_SF = self._products
        down_F = self.mlp.down_proj.weight.float().square().sum(0)
        explained_SF = hp_SF.square() / pp_SF.clamp_min(1e-20) * down_F
        dense = down_F.shape[0]
        rarity_SF = self._fires / self._tokens + _RARE
        if sides == "one":
            side_F, dense_F = explained_SF[:2].argmax(0), torch.arange(dense, device=down_F.device)
        elif sides in PAIRED:
            sign_G, dense_G = _top(_paired(explained_SF) / _paired(rarity_SF), neurons // PAIR)
            up_F = torch.arange(PAIR, device=down_F.device).repeat(len(dense_G))
            side_F, dense_F = PAIR * sign_G.repeat_interleave(PAIR) + up_F, dense_G.repeat_interleave(PAIR)
        else:
            side_F, dense_F = _top(explained_SF / rarity_SF, neurons)
        factor_F = (hp_SF / pp_SF.clamp_min(1e-20))[side_F, dense_F]
        self._write(dense_F, torch.tensor(_SIGNS, device=down_F.device)[side_F].T, factor_F, sides)
        return torch.bincount(dense_F, minlength=dense)

    def _write(self, dense_F: Tensor, signs_2F: Tensor, factor_F: Tensor, sides: str) -> None:
        """Write the neurons; a factor's size goes to gate and up alike, so that h keeps the dense one's size.

        Of a pair the gate takes the root of the factors' geometric mean, and each up what is left of its own; if they
        share the up it takes that root as well, and each down what is left.
        """
        size_F, down_F = factor_F.abs().clamp_min(1e-6), factor_F.sign()
        gate_size_F = size_F.sqrt()
        if sides in PAIRED:
            gate_size_F = size_F.view(-1, PAIR).log().mean(1).mul(0.5).exp().repeat_interleave(PAIR)
        up_size_F = size_F / gate_size_F
        if sides == "mirrored":
            up_size_F, down_F = gate_size_F, down_F * size_F / gate_size_F.square()
        # Neurons that share a row have the same one, with the same size; of a mirrored up the first has its sign.
        self.mlp.neurons_per_gate, self.mlp.mirrored_ups = PAIR if sides in PAIRED else 1, sides == "mirrored"
        for projection, scale_F, step in (
            (self.mlp.gate_proj, signs_2F[0] * gate_size_F, self.mlp.neurons_per_gate),
            (self.mlp.up_proj, signs_2F[1] * up_size_F, PAIR if self.mlp.mirrored_ups else 1),
        ):
            take_rows(projection, dense_F[::step], scale_F[::step])
        rewrite(self.mlp.down_proj, self.mlp.down_proj.weight[:, dense_F] * down_F)


def _paired(x_SF: Tensor) -> Tensor:
    """The sum over both signs of up, [2, F]."""
    return x_SF.view(2, PAIR, -1).sum(1)


def _top(worth_SF: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Row and column of the largest entries, int64 [count] each."""
    chosen = worth_SF.flatten().topk(count).indices
    return chosen // worth_SF.shape[1], chosen % worth_SF.shape[1]


def rewrite(projection: nn.Linear, weight: Tensor) -> None:
    """Give a projection another weight, of any size."""
    projection.weight = nn.Parameter(weight)
    projection.out_features, projection.in_features = weight.shape


def take_rows(projection: nn.Linear, rows_F: Tensor, scale_F: Tensor | None = None) -> None:
    """Make a projection, with its bias, of those of its rows, each times its factor."""
    factor_F = torch.ones_like(rows_F, dtype=projection.weight.dtype) if scale_F is None else scale_F
    rewrite(projection, projection.weight[rows_F] * factor_F[:, None])
    if projection.bias is not None:
        projection.bias = nn.Parameter(projection.bias[rows_F] * factor_F)


@torch.no_grad()
def allot_neurons(
    student: Any,
    teacher: Any,
    batches: Iterable[Tensor],
    dtype: torch.dtype | None = None,
    sides: str = "best",
    width: float = 1.0,
) -> float:
    """Rewrite the neurons of a freshly swapped dReLU student, in place, as the sides of dense neurons that matter most.

    Args:
        student: a dReLU model with the teacher's weights. One that was trained as dReLU would be broken by this.
        teacher: the dense model it was made from; its activation and hidden states are used.
        batches: int64 [B, T] token ids; some ten thousand tokens are enough.
        dtype: of the residual stream, as in last_hidden.
        sides: "best" of all; "pairs", the best gates of either sign with both of their sides; "mirrored", the same with
            one up for both; or "one" of each neuron, that where its gate is positive and its up either way.
        width: neurons of the student over those of the teacher, 1..4, other than for "one"; if it is not 1, their
            number is rounded down to whole blocks of 32. Pairs are whole in any case. The student's config follows.

    Returns:
        the share of dense neurons that got no side at all, 0..1.
    """
    teachers: list[Any] = list(ffns(teacher))
    layers = [_Sides(mlp, dense.act_fn) for mlp, dense in zip(ffns(student), teachers, strict=True)]

    def watch(layer: _Sides) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _module, inputs, _output: layer.add(inputs[0])

    hooks = [mlp.register_forward_hook(watch(layer)) for mlp, layer in zip(teachers, layers, strict=True)]
    try:
        for ids_BT in batches:
            last_hidden(teacher, ids_BT, dtype)
    finally:
        for hook in hooks:
            hook.remove()
    config = student.config
    config.neurons_per_gate, config.mirrored_ups = PAIR if sides in PAIRED else 1, sides == "mirrored"
    multiple = config.neurons_per_gate if width == 1 else BLOCK
    neurons = config.intermediate_size = int(width * config.intermediate_size) // multiple * multiple
    return torch.stack([layer.choose(sides, neurons) == 0 for layer in layers]).float().mean().item()
