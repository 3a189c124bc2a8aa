"""Training with the weights that a file of Q4_0 holds, so that the file loses nothing to the model.

Rounding a trained model of 135M parameters to 4 bits costs more than its sparsity does (docs/experiments.md). A model
that trains with the rounded weights finds others that bear it (quantisation-aware training, Jacob et al. 2018,
arXiv 1712.05877). The rounding is that of ggml: blocks of 32 entries of a row, w = d q with a float16 d and whole q; in
Q4_0 q is in -8..7 and -8 for the entry of largest magnitude, in Q8_0 it is in -127..127 and 127 for that entry. What
has such a form comes through the export as it is.

Shapes: F rows, D columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from turbosparse.relufy.rounded import RoundedLinear

BLOCK = 32


def _rounded(weight_FD: Tensor, top: int, low: int, high: int) -> Tensor:
    """Blocks whose entry of largest magnitude has the level `top`, the others whole levels in low..high."""
    blocks = weight_FD.reshape(-1, BLOCK)
    extreme = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    scale = (extreme / top).half().float()
    # A scale that is no number of half precision is a block of zeros, in the file too.
    levels = torch.where(scale == 0, 0.0, (blocks / scale).round().clamp(low, high))
    return (levels * scale).view_as(weight_FD)


def q4_0(weight_FD: Tensor) -> Tensor:
    """Float32 weights rounded to Q4_0; D is a multiple of 32. What has this form already stays as it is."""
    return _rounded(weight_FD, -8, -8, 7)


def q8_0(weight_FD: Tensor) -> Tensor:
    """Float32 weights rounded to Q8_0; D is a multiple of 32."""
    return _rounded(weight_FD, 127, -127, 127)


class Q4Linear(RoundedLinear):
    """A projection with the weights of a Q4_0 file."""

    rounded = staticmethod(q4_0)


def _projections(model: Any) -> list[nn.Linear]:
    """What a file of Q4_0 holds in it: the matrices of all layers. Embedding and output have more bits there."""
    return [module for module in model.model.layers.modules() if type(module) is nn.Linear]


def fits_q4_0(model: Any) -> bool:
    """Whether every row is a whole number of blocks; an export stores others in another type."""
    return all(linear.in_features % BLOCK == 0 for linear in _projections(model))


def use_q4_0(model: Any) -> None:
    """Make every projection of the layers a Q4Linear that is not a RoundedLinear already; before it is compiled."""
    for linear in _projections(model):
        linear.__class__ = Q4Linear
