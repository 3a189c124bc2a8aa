"""Fit the predictors of all layers at once, from forward passes of a model that is held in memory as a whole.

The loss is that of fit.py. Nothing is collected first: every step carries some windows through the model and takes what
its layers see and do as they come, so a text may be as long as time allows. This is for GPUs; on a few cores it is
cheaper to carry the text through the model once (collect.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from turbosparse.predict.fit import LARGEST, RATE, Tokens, by_score, root_nats
from turbosparse.predict.pace import Pace, rate, shares
from turbosparse.predict.sinks import sinks
from turbosparse.predict.stack import Stack, whitenings
from turbosparse.predict.whole import Whole, fast


class Text:
    """Windows of token ids, in an order of their own every time that they have all been seen."""

    def __init__(self, windows: Tensor, batch: int, seed: int) -> None:
        """Windows: int64 [windows, length]; batch: windows of a step."""
        self._windows, self._batch = windows, min(batch, len(windows))
        self._generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            order = torch.randperm(len(self._windows), generator=self._generator)
            for start in range(0, len(order) - self._batch + 1, self._batch):
                yield self._windows[order[start : start + self._batch]]


class Ground:
    """What all fits to one model begin with: samples of its layers, and what their neurons are worth.

    Attributes:
        nats: over h^2, float32 [ffn] a layer.
        worth: the same, but 0 for the neurons that are always selected.
        always: those neurons, bool [ffn] a layer.
        scale: |h| times this is m of fit.py, float32 [layers, 1, ffn].
    """

    def __init__(self, whole: Whole, windows: Tensor, worth: Sequence[Tensor]) -> None:
        """Windows: int64 [windows, length], enough of them to say what inputs look like."""
        seen = whole.watch(windows)
        self.nats = list(worth)
        self.worth: list[Tensor] = []
        self.always: list[Tensor] = []
        self._samples: list[Tokens] = []
        scales: list[Tensor] = []
        for tokens, each in zip(seen, worth, strict=True):
            mass = tokens.batch(slice(None), whole.device)[1]
            always = sinks(mass.max(0).values, each)
            self.always.append(always)
            self.worth.append(torch.where(always, 0.0, each))
            scales.append(root_nats(mass, self.worth[-1]))
            self._samples.append(tokens)
        self.scale = torch.stack(scales)[:, None]
        self._white = whitenings([self.inputs(layer) for layer in range(len(seen))])

    def inputs(self, layer: int) -> Tensor:
        """Sampled inputs of a layer, float32 [tokens, hidden]."""
        return self._samples[layer].batch(slice(None), self.scale.device)[0]

    def on_device(self, *matrices: npt.NDArray[np.float32]) -> tuple[Tensor, ...]:
        """The same where the model is."""
        return tuple(torch.from_numpy(matrix).to(self.scale.device) for matrix in matrices)

    def begin(self, ranks: Sequence[int], kinds: tuple[Type, Type], seed: int) -> Stack:
        """Untrained predictors."""
        torch.manual_seed(seed)
        samples = [tokens.batch(slice(None), self.scale.device) for tokens in self._samples]
        weighed = [(x, mass * scale) for (x, mass), scale in zip(samples, self.scale, strict=True)]
        return Stack.begin(ranks, kinds, self._white, weighed)


def learn(
    whole: Whole,
    ground: Ground,
    stacks: Sequence[Stack],
    text: Text,
    pace: Pace,
    progress: Callable[[float], None],
) -> int:
    """Train the stacks, all from the same passes, rounding in the second half; returns the number of steps.

    Args:
        whole: the model.
        ground: of it.
        stacks: what to train.
        text: to learn from.
        pace: says when it is done.
        progress: called with the share that is done.
    """
    parameters = [parameter for stack in stacks for parameter in stack.parameters]
    optimizer = torch.optim.Adam(parameters, lr=RATE, betas=(0.9, 0.98), fused=whole.device.type == "cuda")
    steps = 0
    for done, windows in zip(shares(pace), text, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = RATE * rate(done)
        optimizer.zero_grad()
        with fast(whole.device):
            x, m = _stacked(whole.watch(windows), ground.scale)
        for stack in stacks:
            _backward(stack, x, m, done >= 0.5)
        optimizer.step()
        steps += 1
        progress(done)
    return steps


def _stacked(seen: Sequence[Tokens], scale: Tensor) -> tuple[Tensor, Tensor]:
    """X [layers, tokens, hidden] and m [layers, tokens, ffn]."""
    x = torch.stack([torch.as_tensor(tokens.x) for tokens in seen]).float()
    mass = torch.stack([torch.as_tensor(tokens.mass) for tokens in seen]).float()
    return x, mass.mul_(scale).clamp_max_(LARGEST)


def _backward(stack: Stack, x: Tensor, m: Tensor, rounding: bool) -> None:
    with fast(x.device):
        fc1, fc2 = stack.matrices(rounding)
        score = torch.relu(x @ fc1.mT) @ fc2.mT
    with torch.no_grad():
        gradient = by_score(score, m).div_(x.shape[1])
    score.backward(gradient.to(score.dtype))
