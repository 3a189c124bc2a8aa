"""Look at what the FFNs of a sparse model compute while text goes through it, without a gradient.

Shapes: B windows, T tokens, F neurons of one FFN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from turbosparse.relufy.objective import ffns, last_hidden

Tap = Callable[[Tensor, Tensor, Tensor], None]


@torch.no_grad()
def observe(model: Any, taps: Sequence[Tap], batches: Iterable[Tensor], dtype: torch.dtype | None = None) -> None:
    """Run batches through a model whose FFNs hand gate, up and h [B, T, F] to a tap each; those they had come back.

    Args:
        model: a sparse model.
        taps: one for each layer.
        batches: int64 [B, T] token ids.
        dtype: of the residual stream, as in last_hidden.
    """
    watched = [(mlp, mlp.tap, tap) for mlp, tap in zip(ffns(model), taps, strict=True)]
    try:
        for mlp, _, tap in watched:
            mlp.tap = tap
        for ids_BT in batches:
            last_hidden(model, ids_BT, dtype)
    finally:
        for mlp, before, _ in watched:
            mlp.tap = before


class _Energy:
    """Tap that adds up the squares of each neuron's h."""

    def __init__(self, mlp: Any) -> None:
        self._sum_F = torch.zeros(mlp.down_proj.in_features, device=mlp.down_proj.weight.device)
        self._tokens = 0

    def __call__(self, gate_BTF: Tensor, up_BTF: Tensor, h_BTF: Tensor) -> None:
        h_NF = h_BTF.flatten(0, -2)
        self._sum_F += h_NF.float().square().sum(0)
        self._tokens += len(h_NF)

    def mean(self) -> Tensor:
        return self._sum_F / max(1, self._tokens)


def mean_squares(model: Any, batches: Iterable[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """The mean square of every neuron's h, float32 [F] a layer; arguments as of `observe`."""
    taps = [_Energy(mlp) for mlp in ffns(model)]
    observe(model, taps, batches, dtype)
    return [tap.mean() for tap in taps]
