"""The work of one run of train-predictors: predictors for all layers, fitted or kept, and their thresholds."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from turbosparse.errors import UserError
from turbosparse.model.config import ModelConfig
from turbosparse.model.gguf import GGUFFile
from turbosparse.predict.budget import affordable, ffn_bytes, kinds_of
from turbosparse.predict.calibrate import price_for
from turbosparse.predict.collect import Collector, quick_curves
from turbosparse.predict.decoder import tensor_of
from turbosparse.predict.fit import BATCH, Tokens, fit
from turbosparse.predict.measure import Curve, LayerQuality, Scores, by_gate, curve, edges, low_rank
from turbosparse.predict.ranks import cost, share_out, tried
from turbosparse.predict.sensitivity import sensitivities
from turbosparse.predict.sinks import FEW_TOKENS, always_selecting, sinks
from turbosparse.predict.wish import Wish
from turbosparse.predict.write import StoredPredictor

HELD_OUT = 8  # of so many windows, one sets the threshold or, every other time, is measured on
_FEW_WINDOWS = 16  # for sensitivities and ranks
_FEWEST_STEPS = 100
_SEED = 1

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Fitted:
    """A layer's predictor, whose threshold is not chosen yet, and its curves on the text for that and for measuring."""

    stored: StoredPredictor
    tuned: Curve
    measured: Curve

    def save(self, path: Path) -> None:
        np.savez(
            path,
            fc1=self.stored.fc1,
            fc2=self.stored.fc2,
            score=self.tuned.score,
            tuned=self.tuned.sums,
            tuned_whole=self.tuned.whole,
            measured=self.measured.sums,
            measured_whole=self.measured.whole,
        )

    @classmethod
    def load(cls, path: Path, kinds: tuple[Type, Type], shapes: tuple[tuple[int, int], tuple[int, int]]) -> Fitted:
        with np.load(path) as saved:
            curves = (Curve(saved["score"], saved[name], saved[f"{name}_whole"]) for name in ("tuned", "measured"))
            return cls(StoredPredictor(saved["fc1"], saved["fc2"], kinds, shapes, 0.0), *curves)


class Work:
    """One run: whatever is done lies in the folder."""

    def __init__(
        self,
        file: GGUFFile,
        config: ModelConfig,
        pieces: list[list[int]],
        wish: Wish,
        folder: Path,
        progress: Progress,
    ) -> None:
        self._file, self._config, self._wish, self._folder, self._progress = file, config, wish, folder, progress
        self._device = device_of(wish.device)
        self._collector = Collector(file, config, pieces, folder, self._device)
        held_out = 1 if wish.keep or wish.gates else HELD_OUT
        which = np.arange(len(pieces)) % (2 * held_out)
        self._tuned, self._measured = (
            np.repeat(which == place, len(pieces[0])) for place in (held_out - 1, 2 * held_out - 1)
        )
        self._kinds = self._types()
        fixed = wish.rank is not None or wish.keep or wish.gates
        self._blocks = 0 if fixed else affordable(file, config, self._kinds, wish.share)
        # Evenly from all of the text but what is measured on.
        known = [piece for piece, place in zip(pieces, which, strict=True) if place != 2 * held_out - 1]
        self._few = known[:: max(1, len(known) // _FEW_WINDOWS)][:_FEW_WINDOWS]
        self._worth = self._sensitivities()
        self._ranks = self._choose_ranks()

    def _types(self) -> tuple[Type, Type]:
        """Of fc1 and fc2: those that are kept, or those of the FFNs."""
        if self._wish.keep:
            first, second = (self._file.tensors[f"blk.0.{name}.weight"].type for name in ("fc1", "fc2"))
            return first, second
        return kinds_of(self._file, self._config)

    def run(self) -> list[tuple[StoredPredictor, LayerQuality]]:
        """Every layer's predictor, and what it does on held-out tokens."""
        fitted = [self._layer(index) for index in range(self._config.n_layers)]
        price = price_for([layer.tuned for layer in fitted], self._wish.recall)
        done = []
        for index, layer in enumerate(fitted):
            chosen = layer.tuned.best(price)
            share = layer.stored.nbytes / ffn_bytes(self._file, index)
            quality = layer.measured.quality(chosen, index, layer.stored.rank, share)
            threshold = float(layer.tuned.score[chosen])
            done.append((dataclasses.replace(layer.stored, threshold=threshold, kept=quality.mass_kept), quality))
        return done

    def _layer(self, layer: int) -> Fitted:
        """A layer's predictor, fitted now or before."""
        path = self._folder / f"layer-{layer}.npz"
        if not path.exists():
            tokens = self._collector.layer(layer, lambda part: self._report(layer, part / 2)).near(self._device)
            _save(path, lambda partial: self._measure(layer, tokens).save(partial))
        self._collector.finish(layer)
        self._report(layer, 1.0)
        return Fitted.load(path, self._kinds, self._shapes(layer))

    def _measure(self, layer: int, tokens: Tokens) -> Fitted:
        tuned, measured = (tokens.where(part) for part in (self._tuned, self._measured))
        worth = self._worth[layer]
        stored, scores = self._gate(layer) if self._wish.gates else self._low_rank(layer, tokens, tuned)
        tried_scores = edges(tuned, scores, self._device)
        return Fitted(stored, *(curve(part, scores, worth, tried_scores) for part in (tuned, measured)))

    def _gate(self, layer: int) -> tuple[StoredPredictor, Scores]:
        weight = tensor_of(self._file, f"blk.{layer}.ffn_gate.weight", self._device)
        return StoredPredictor.of_gate(), by_gate(weight, self._config.neurons_per_gate)

    def _low_rank(self, layer: int, tokens: Tokens, tuned: Tokens) -> tuple[StoredPredictor, Scores]:
        worth = self._worth[layer]
        always = sinks(tokens.where(~self._measured).largest(self._device), worth)
        stored = self._kept(layer) if self._wish.keep else self._fit(layer, tokens, torch.where(always, 0.0, worth))
        stored = always_selecting(stored, always, tuned.batch(slice(FEW_TOKENS), self._device)[0])
        fc1, fc2 = (torch.from_numpy(matrix).to(self._device) for matrix in stored.matrices())
        return stored, low_rank(fc1, fc2)

    def _fit(self, layer: int, tokens: Tokens, worth: Tensor) -> StoredPredictor:
        learned = ~(self._tuned | self._measured)
        fc1, fc2 = fit(
            tokens.where(learned),
            worth,
            self._ranks[layer],
            self._kinds[1],
            max(_FEWEST_STEPS, round(self._wish.epochs * learned.sum() / BATCH)),
            _SEED + layer,
            self._device,
            lambda part: self._report(layer, 0.5 + part / 2),
        )
        return StoredPredictor.of(fc1.cpu().numpy(), fc2.cpu().numpy(), self._kinds)

    def _kept(self, layer: int) -> StoredPredictor:
        first, second = (self._file.tensors[f"blk.{layer}.{name}.weight"] for name in ("fc1", "fc2"))
        fc1, fc2 = (tensor.data.reshape(tensor.shape[0], -1) for tensor in (first, second))
        return StoredPredictor(fc1, fc2, self._kinds, self._shapes(layer), 0.0)

    def _sensitivities(self) -> list[Tensor]:
        """What neurons of all layers cost, measured now or before."""
        path = self._folder / "sensitivities.npy"
        if not path.exists():
            some = self._few[::2]  # the gradient takes three times as long as the rest, and is soon good enough
            found = sensitivities(self._file, self._config, some, self._device, lambda part: self._report(-2, part))
            _save(path, lambda partial: np.save(partial, torch.stack(found).numpy()))
        return list(torch.from_numpy(np.load(path)).to(self._device))

    def _choose_ranks(self) -> list[int]:
        """The same wherever the run was interrupted: they are kept, too."""
        layers = self._config.n_layers
        if self._wish.gates:
            return [0] * layers
        if self._wish.keep and self._config.predictor is not None:
            return list(self._config.predictor.ranks)
        if self._wish.rank is not None:
            return [self._wish.rank] * layers
        path = self._folder / "ranks.json"
        if not path.exists():
            ranks = tried(self._blocks, layers)
            curves = quick_curves(
                self._file,
                self._config,
                self._few,
                self._worth,
                ranks,
                self._device,
                lambda part: self._report(-1, part),
            )
            price = price_for([layer[len(ranks) // 2] for layer in curves], self._wish.recall)
            costs = [[cost(found, price) for found in layer] for layer in curves]
            path.write_text(json.dumps(share_out(ranks, costs, self._blocks)))
        chosen: list[int] = json.loads(path.read_text())
        return chosen

    def _shapes(self, layer: int) -> tuple[tuple[int, int], tuple[int, int]]:
        rank = self._ranks[layer]
        return (rank, self._config.hidden_size), (self._config.ffn_size, rank)

    def _report(self, layer: int, part: float) -> None:
        self._progress(round((layer + 2 + part) * 100), (self._config.n_layers + 2) * 100)


def device_of(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device here; give cpu, or leave the option out.")
    return torch.device(name)


def _save(path: Path, write: Callable[[Path], object]) -> None:
    """A file that is there is whole."""
    partial = path.with_name(f"partial-{path.name}")
    write(partial)
    os.replace(partial, path)
