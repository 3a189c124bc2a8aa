"""Drop the gates that give a sparse model least, with their neurons, so that there is less to read.

A student that is wider than its dense model loses less by the swap (allot.py), and once it is trained, part of its
neurons hardly matter. Exact mode still reads their gates for every token: what is dropped makes the model faster, and
training makes up for it. A gate is worth the energy that its neurons bring into the output of the layer if they are
taken to be independent, the sum of E[h^2] |down|^2: magnitude times activation, as Wanda has it for single weights (Sun
et al. 2023, arXiv 2306.11695).

Shapes: B windows, T tokens, F neurons of one FFN, G gates, K gates that are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from turbosparse.relufy.allot import rewrite, take_rows
from turbosparse.relufy.objective import ffns
from turbosparse.relufy.observe import mean_squares
from turbosparse.relufy.quantized import BLOCK


def gates_kept(neurons: int, neurons_per_gate: int, share: float) -> int:
    """How many gates stay if `share` of them go, 0..1: neurons are whole blocks of 32, rounded down; 0: none would."""
    multiple = math.lcm(BLOCK, neurons_per_gate)
    return round(neurons * (1 - share)) // multiple * multiple // neurons_per_gate


@torch.no_grad()
def prune_gates(model: Any, share: float, batches: Iterable[Tensor], dtype: torch.dtype | None = None) -> float:
    """Drop the gates of every layer that are worth least, in the model, in place, and in its config.

    Args:
        model: a sparse model.
        share: of the gates, 0..1; every layer loses as many.
        batches: int64 [B, T] token ids; some ten thousand tokens are enough.
        dtype: of the residual stream, as in last_hidden.

    Returns:
        the share of what all gates are worth that went with them, mean of the layers, 0..1.

    Raises:
        ValueError: no gate would stay.
    """
    config = model.config
    keep, group = gates_kept(config.intermediate_size, config.neurons_per_gate, share), config.neurons_per_gate
    if not keep:
        raise ValueError(f"{share} of {config.gate_rows()} gates leaves none")
    squares = mean_squares(model, batches, dtype)
    lost = torch.stack([_keep_best(mlp, each, keep, group) for mlp, each in zip(ffns(model), squares, strict=True)])
    config.intermediate_size = keep * group
    return lost.mean().item()


def _keep_best(mlp: Any, squares_F: Tensor, keep: int, group: int) -> Tensor:
    """Keep so many gates of a layer, in their order; returns the share of the worth that is lost."""
    worth_G = (squares_F * mlp.down_proj.weight.float().square().sum(0)).view(-1, group).sum(1)
    gates_K = worth_G.topk(keep).indices.sort().values
    neurons = (gates_K[:, None] * group + torch.arange(group, device=gates_K.device)).flatten()
    take_rows(mlp.gate_proj, gates_K)
    take_rows(mlp.up_proj, neurons[::2] // 2 if mlp.mirrored_ups else neurons)
    rewrite(mlp.down_proj, mlp.down_proj.weight[:, neurons].contiguous())
    return 1 - worth_G[gates_K].sum() / worth_G.sum().clamp_min(1e-20)
