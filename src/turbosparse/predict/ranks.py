"""How wide the predictor of each layer is, under one budget of bytes.

What a linear map of rank r can explain of a layer's firing is known in closed form (reduced-rank regression: Izenman,
J. Multivariate Analysis 5, 1975): with whitened inputs z, the squares of the r largest singular values of
E[z (a - E a)], a being 1 where a neuron fires. Blocks of 32 rows are given out one by one, each to the layer whose
unexplained firing it lowers most. Layers that a narrow predictor explains well stay narrow; others get more.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 32  # rows of fc2 are then whole blocks of Q4_0 and Q8_0
_FLOOR = 1e-3  # of the mean eigenvalue: directions that hardly vary are noise


def whitening(x: Tensor) -> Tensor:
    """W with E[(x W)^T (x W)] about one, float32 [hidden, hidden]; x are inputs [tokens, hidden], not centred."""
    moments = (x.T @ x / len(x)).double()
    values, vectors = torch.linalg.eigh(moments)
    values = values.clamp_min(float(values.mean()) * _FLOOR)
    return (vectors * values.rsqrt()).float()


def explained(z: Tensor, fires: Tensor) -> tuple[Tensor, Tensor]:
    """Shares of the variance of `fires` [tokens, ffn] that directions of whitened inputs explain, the largest first.

    Returns:
        shares [hidden], and the directions as columns [hidden, hidden].
    """
    centred = fires.float() - fires.float().mean(0)
    cross = z.T @ centred / len(z)
    values, vectors = torch.linalg.eigh(cross @ cross.T)
    variance = centred.square().mean(0).sum().clamp_min(1e-12)
    return values.flip(0).clamp_min(0) / variance, vectors.flip(1)


def share_out(shares: Sequence[Tensor], blocks: int) -> list[int]:
    """Ranks of the layers, `blocks` times 32 in all and at least 32 each, where the layers' `shares` are largest."""
    gains = [[float(part.sum()) for part in layer.split(BLOCK)] for layer in shares]
    ranks = [BLOCK] * len(gains)
    left = [(-layer[1], index) for index, layer in enumerate(gains) if len(layer) > 1]
    heapq.heapify(left)
    for _ in range(blocks - len(gains)):
        if not left:
            break
        _, index = heapq.heappop(left)
        ranks[index] += BLOCK
        following = ranks[index] // BLOCK
        if following < len(gains[index]):
            heapq.heappush(left, (-gains[index][following], index))
    return ranks
