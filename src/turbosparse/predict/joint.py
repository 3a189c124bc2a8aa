"""The work of train-predictors on a model that is held in memory: all layers are fitted at once, then end to end.

Nothing is kept on disk, so a run that is stopped begins anew; it is meant for a GPU, where it takes minutes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from turbosparse.model.config import ModelConfig
from turbosparse.model.gguf import GGUFFile
from turbosparse.predict.budget import affordable, ffn_bytes, kinds_of
from turbosparse.predict.calibrate import price_for
from turbosparse.predict.end_to_end import Aim, refine
from turbosparse.predict.finish import by_price, curves, stored
from turbosparse.predict.measure import LayerQuality
from turbosparse.predict.pace import by_steps
from turbosparse.predict.ranks import cost, share_out, tried
from turbosparse.predict.sensitivity import sensitivities
from turbosparse.predict.stack import Stack
from turbosparse.predict.together import Ground, Text, learn
from turbosparse.predict.whole import Whole
from turbosparse.predict.wish import Wish
from turbosparse.predict.work import HELD_OUT, Progress, device_of
from turbosparse.predict.write import StoredPredictor

_FEW_WINDOWS = 16  # for sensitivities
_GROUND_WINDOWS = 40
_CURVE_WINDOWS = 32  # for thresholds, and for measuring
_BATCH, _BATCH_END = 4096, 8192  # tokens of a step, of the layers' fits and end to end
_QUICK_STEPS = 300
_FEWEST_STEPS = 100
_DEARER = 4.0  # what is missed costs that many times what it costs alone, when end-to-end training begins
_SEED = 1


class Joint:
    """One run, in the order of its methods."""

    def __init__(
        self, file: GGUFFile, config: ModelConfig, pieces: list[list[int]], wish: Wish, progress: Progress
    ) -> None:
        self._file, self._config, self._wish, self._progress = file, config, wish, progress
        self._kinds = kinds_of(file, config)
        self._blocks = 0 if wish.rank is not None else affordable(file, config, self._kinds, wish.share)
        which = np.arange(len(pieces)) % (2 * HELD_OUT)
        windows = torch.tensor(pieces)
        self._learned = windows[torch.from_numpy((which != HELD_OUT - 1) & (which != 2 * HELD_OUT - 1))]
        device = device_of(wish.device)
        few = _evenly(self._learned, _FEW_WINDOWS).tolist()
        worth = sensitivities(file, config, few, device, lambda done: self._report(0, done))
        self._whole = Whole(file, config, device)
        self._ground = Ground(
            self._whole, _evenly(self._learned, _GROUND_WINDOWS), [layer.to(device) for layer in worth]
        )
        self._tuned, self._measured = (
            self._whole.watch(_evenly(windows[torch.from_numpy(which == place)], _CURVE_WINDOWS))
            for place in (HELD_OUT - 1, 2 * HELD_OUT - 1)
        )

    def run(self) -> list[tuple[StoredPredictor, LayerQuality]]:
        """Every layer's predictor, and what it does on held-out tokens."""
        stack = self._ground.begin(self._choose_ranks(), self._kinds, _SEED)
        steps = max(_FEWEST_STEPS, round(self._wish.epochs * self._learned.numel() / _BATCH))
        self._learn([stack], steps, 2)
        if self._wish.end_to_end:
            self._refine(stack)
        return self._finish(stack)

    def _choose_ranks(self) -> list[int]:
        layers = self._config.n_layers
        if self._wish.rank is not None:
            return [self._wish.rank] * layers
        ranks = tried(self._blocks, layers)
        stacks = [self._ground.begin([rank] * layers, self._kinds, _SEED) for rank in ranks]
        self._learn(stacks, _QUICK_STEPS, 1)
        found = [curves(stored(stack, self._ground), self._ground, self._tuned) for stack in stacks]
        price = price_for(found[len(ranks) // 2], self._wish.recall)
        costs = [[cost(of_rank[layer], price) for of_rank in found] for layer in range(layers)]
        return share_out(ranks, costs, self._blocks)

    def _learn(self, stacks: Sequence[Stack], steps: int, phase: int) -> None:
        text = Text(self._learned, self._windows(_BATCH), _SEED + phase)
        learn(self._whole, self._ground, stacks, text, by_steps(steps), lambda done: self._report(phase, done))

    def _refine(self, stack: Stack) -> None:
        """End to end, with as many neurons selected as the layers' own fit selects."""
        found = curves(stored(stack, self._ground), self._ground, self._tuned)
        index, price = by_price(found, self._wish.recall)
        selected = sum(layer.sums[0, at] for layer, at in zip(found, index, strict=True))
        fired = sum(layer.whole[1] for layer in found)
        thresholds = [float(layer.score[at]) for layer, at in zip(found, index, strict=True)]
        aim = Aim(float(selected / max(fired, 1e-9)), _DEARER * price)
        text = Text(self._learned, self._windows(_BATCH_END), _SEED + 3)
        pace = by_steps(self._wish.end_to_end)
        refine(
            self._whole,
            self._ground,
            stack,
            thresholds,
            text,
            pace,
            aim,
            lambda done, divergence: self._report(3, done),
        )

    def _finish(self, stack: Stack) -> list[tuple[StoredPredictor, LayerQuality]]:
        predictors = stored(stack, self._ground)
        tuned = curves(predictors, self._ground, self._tuned)
        measured = curves(predictors, self._ground, self._tuned, self._measured)
        index, _ = by_price(tuned, self._wish.recall)
        done = []
        for layer, (predictor, at) in enumerate(zip(predictors, index, strict=True)):
            share = predictor.nbytes / ffn_bytes(self._file, layer)
            quality = measured[layer].quality(at, layer, predictor.rank, share)
            threshold = float(tuned[layer].score[at])
            done.append((dataclasses.replace(predictor, threshold=threshold, kept=quality.mass_kept), quality))
        return done

    def _windows(self, tokens: int) -> int:
        return max(1, tokens // self._learned.shape[1])

    def _report(self, phase: int, done: float) -> None:
        self._progress(round((phase + done) * 100), 400)


def _evenly(windows: Tensor, count: int) -> Tensor:
    return windows[:: max(1, len(windows) // count)][:count]
