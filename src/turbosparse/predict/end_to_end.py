"""Train the predictors of all layers on what their misses do to the model's own output.

Layer by layer (fit.py) every neuron is weighed by what it costs alone. What several layers miss adds up, and moves the
inputs of those behind. So here the model runs as the engine will run it, with the selected neurons only; the loss is

    KL(exact || predicted) / price + the number of neurons that are selected,    per token,

both terms through the decisions: forward a neuron is selected or not, backward the decision has the slope of a wide
sigmoid (straight-through: Bengio et al., 2013). The price follows from how many neurons may be selected over those that
fire. Such gradients are noisy, so the loss of the layers is kept as an anchor, weighed in the same unit. The weights of
the model stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from turbosparse.predict.fit import COST, LARGEST, by_score
from turbosparse.predict.pace import Pace, rate, shares
from turbosparse.predict.stack import Stack
from turbosparse.predict.together import Ground, Text
from turbosparse.predict.whole import Whole, fast

_WIDTH = 2.0  # of the sigmoid, in scores
_LOWEST = 0.01  # of m at a threshold, over COST: below, a layer selects nearly all
_PULL = 0.1  # how fast the price follows, in logs a step


@dataclass(frozen=True)
class Aim:
    """What is trained for.

    Attributes:
        selected: neurons selected over neurons that fire, in all layers together.
        price: nats a neuron to begin with.
        anchor: weight of the layers' own loss.
        rate: of the optimiser, at its highest.
    """

    selected: float
    price: float
    anchor: float = 1.0
    rate: float = 1e-3


class _Decide(torch.autograd.Function):
    """H where the score is positive or the neuron always selected, and the gradients that train the score."""

    @staticmethod
    def forward(ctx: Any, score: Tensor, h: Tensor, always: Tensor, anchor: Tensor) -> Tensor:
        chosen = (score >= 0) | always
        ctx.save_for_backward(score, h, chosen, always, anchor)
        return h * chosen

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        score, h, chosen, always, anchor = ctx.saved_tensors
        by_output = gradients[0]
        tokens = score.shape[:-1].numel()
        open_ = torch.sigmoid(score.float() / _WIDTH)
        slope = 4 * open_ * (1 - open_)
        by_score = torch.where(always, 0.0, slope * (by_output.float() * h.float() + 1 / tokens) + anchor.float())
        return by_score.to(score.dtype), by_output * chosen, None, None


class _Masks:
    """What a pass with predictors does to h, and how many neurons it selects."""

    def __init__(self, stack: Stack, ground: Ground, thresholds: Tensor, anchor: float) -> None:
        fc1, fc2 = stack.matrices(True)
        self._fc1, self._fc2 = fc1.unbind(), fc2.unbind()
        self._ground, self._thresholds, self._anchor = ground, thresholds, anchor
        self.selected, self.fired = (torch.zeros((), device=thresholds.device) for _ in range(2))

    def __call__(self, layer: int, x: Tensor, h: Tensor) -> Tensor:
        score = torch.relu(x.detach() @ self._fc1[layer].T) @ self._fc2[layer].T
        with torch.no_grad():
            anchor = self._pull(layer, score, h)
        score = score - self._thresholds[layer]
        with torch.no_grad():
            self.selected += (score >= 0).sum()
            self.fired += (h != 0).sum()
        kept: Tensor = _Decide.apply(score, h, self._ground.always[layer], anchor)
        return kept

    def _pull(self, layer: int, score: Tensor, h: Tensor) -> Tensor:
        """The gradient of the layer's own loss, in neurons: a neuron at the threshold is worth one."""
        m = (h.abs().float() * self._ground.scale[layer]).clamp_max_(LARGEST)
        at_threshold = COST * self._thresholds[layer].exp().clamp_min(_LOWEST)
        weight = self._anchor / (score.shape[:-1].numel() * at_threshold)
        return by_score(score, m).mul_(weight).to(score.dtype)


def refine(
    whole: Whole,
    ground: Ground,
    stack: Stack,
    thresholds: Sequence[float],
    text: Text,
    pace: Pace,
    aim: Aim,
    progress: Callable[[float, float], None],
) -> int:
    """Train a stack that has been fitted before; returns the number of steps.

    Args:
        whole: the model.
        ground: of it.
        stack: what to train.
        thresholds: of the layers, which stay.
        text: to learn from.
        pace: says when it is done.
        aim: what for.
        progress: called with the share that is done and, every 50 steps, the divergence of the last one in nats.
    """
    optimizer = torch.optim.Adam(stack.parameters, lr=aim.rate, betas=(0.9, 0.98), fused=whole.device.type == "cuda")
    at = torch.tensor(thresholds, dtype=torch.float32, device=whole.device)
    log_price = torch.tensor(aim.price, dtype=torch.float32, device=whole.device).log()
    step, divergence = 0, torch.zeros(())
    for step, (done, windows) in enumerate(zip(shares(pace), text, strict=False), 1):
        for group in optimizer.param_groups:
            group["lr"] = aim.rate * rate(done)
        with fast(whole.device):
            masks = _Masks(stack, ground, at, aim.anchor)
            divergence = _divergence(whole, windows, masks)
        optimizer.zero_grad()
        (divergence / log_price.exp()).backward()
        optimizer.step()
        log_price += _PULL * (masks.selected / masks.fired.clamp_min(1) / aim.selected - 1)
        progress(done, divergence.item() if step % 50 == 1 else float("nan"))
    return step


def _divergence(whole: Whole, windows: Tensor, masks: _Masks) -> Tensor:
    """KL(exact || predicted), mean of the tokens."""
    with torch.no_grad():
        exact = torch.log_softmax(whole.logits(whole(windows)), -1)
    predicted = torch.log_softmax(whole.logits(whole(windows, masks)), -1)
    return functional.kl_div(predicted, exact, reduction="none", log_target=True).sum(-1).mean()
