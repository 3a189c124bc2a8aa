"""Give every sparse FFN an activation threshold: the dead zone below which its h becomes zero.

Many of the neurons that fire hardly matter: on a trained dReLU model, dropping every h below 0.3 times its layer's root
mean square silenced four active neurons of fourteen for 0.011 nats (docs/experiments.md, 2026-11-24). What training
does not spend on keeping small activations alive or on pushing them below zero, it can spend on the text.

Shapes: B windows, T tokens, F neurons of one FFN.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from turbosparse.relufy.objective import ffns
from turbosparse.relufy.observe import mean_squares


def set_thresholds(model: Any, share: float, batches: Iterable[Tensor], dtype: torch.dtype | None = None) -> None:
    """Set each layer's threshold, in the model and in its config, to `share` of the root mean square of its h.

    Args:
        model: a sparse model; thresholds that it has are left out of the measurement and replaced.
        share: 0.3 is a good start; more gives more zeros and costs more.
        batches: int64 [B, T] token ids; some ten thousand tokens are enough.
        dtype: of the residual stream, as in last_hidden.

    A layer whose h is zero on all of them gets the threshold 0.
    """
    for mlp in ffns(model):
        mlp.set_threshold(None)
    squares = mean_squares(model, batches, dtype)
    thresholds = [share * square_F.mean().sqrt().item() for square_F in squares]
    model.config.activation_threshold = thresholds
    for mlp, threshold in zip(ffns(model), thresholds, strict=True):
        mlp.set_threshold(threshold)
