"""Training with the weights that a file of Q4_0 holds, so that the file loses nothing to the model.

Rounding a trained model of 135M parameters to 4 bits costs more than its sparsity does (docs/experiments.md). A model
that trains with the rounded weights finds others that bear it (quantisation-aware training, Jacob et al. 2018,
arXiv 1712.05877). The rounding is that of ggml: blocks of 32 entries of a row, w = d q with q in -8..7, where the entry
of largest magnitude has q = -8, and d is a float16. A weight of this form comes through the export as it is.

Shapes: F rows, D columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from turbosparse.relufy.rounded import RoundedLinear

BLOCK = 32


def q4_0(weight_FD: Tensor) -> Tensor:
    """Float32 weights rounded to Q4_0; D is a multiple of 32. What has this form already stays as it is."""
    blocks = weight_FD.reshape(-1, BLOCK)
    extreme = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    scale = (extreme / -8).half().float()
    # A scale that is no number of half precision is a block of zeros, in the file too.
    levels = torch.where(scale == 0, 0.0, (blocks / scale).round().clamp(-8, 7))
    return (levels * scale).view_as(weight_FD)


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
