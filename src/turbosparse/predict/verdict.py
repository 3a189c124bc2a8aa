"""What predictors do to a whole model on held-out text: the layers' selections, and the output's divergence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from turbosparse.predict.whole import Whole
from turbosparse.predict.write import StoredPredictor

_WINDOWS = 4  # at once


@dataclass(frozen=True)
class Verdict:
    """A model with predictors, as the engine runs it but for its rounding of activations.

    Attributes:
        kl: KL(exact || predicted), nats a token.
        nats: cross-entropy of the text, exact and predicted, nats a token.
        selected, selected_all: neurons selected over neurons that fire; mean of layers, and of all layers together.
        kept: share of |h| that is selected, a layer, on the inputs that predicted mode makes.
    """

    kl: float
    nats: tuple[float, float]
    selected: float
    selected_all: float
    kept: tuple[float, ...]


@torch.no_grad()
def judge(whole: Whole, predictors: Sequence[StoredPredictor], windows: Tensor) -> Verdict:
    """Run windows, int64 [windows, length], exactly and with the predictors."""
    matrices = [[torch.from_numpy(each).to(whole.device) for each in layer.matrices()] for layer in predictors]
    sums = torch.zeros(len(predictors), 4, dtype=torch.float64, device=whole.device)

    def select(layer: int, x: Tensor, h: Tensor) -> Tensor:
        fc1, fc2 = matrices[layer]
        chosen = torch.relu(x @ fc1.T) @ fc2.T >= predictors[layer].threshold
        kept = h * chosen
        sums[layer] += torch.stack([chosen.sum(), (h != 0).sum(), kept.abs().sum(), h.abs().sum()])
        return kept

    totals = torch.zeros(3, dtype=torch.float64, device=whole.device)
    for part in windows.split(_WINDOWS):
        exact, predicted = (torch.log_softmax(whole.logits(whole(part, mask)), -1) for mask in (None, select))
        target = part[:, 1:, None].to(whole.device)
        truth = [-log_p[:, :-1].gather(-1, target).mean() for log_p in (exact, predicted)]
        divergence = functional.kl_div(predicted, exact, reduction="none", log_target=True).sum(-1).mean()
        totals += len(part) * torch.stack([divergence, *truth])
    kl, *nats = (totals / len(windows)).tolist()
    selected, fired, kept, mass = sums.T
    return Verdict(
        kl=kl,
        nats=(nats[0], nats[1]),
        selected=float((selected / fired.clamp_min(1)).mean()),
        selected_all=float(selected.sum() / fired.sum().clamp_min(1)),
        kept=tuple((kept / mass.clamp_min(1e-30)).tolist()),
    )
