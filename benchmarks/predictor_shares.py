"""Predictors of several sizes within a time, then trained end to end: what they select, keep and cost on other text.

    python benchmarks/predictor_shares.py MODEL.gguf DATA OUT SECONDS [--device cuda]

DATA holds train.npz, tuned.npz and measured.npz, each with one array `w` of token ids, [windows, length]: to learn
from, to set thresholds on and to measure on. All sizes are fitted from the same passes. OUT gets log.json and, as soon
as it is made, NAME.npz of every result: fc1_L and fc2_L as they are stored, ranks, kinds, thresholds that keep 98 %.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from turbosparse.model.config import ModelConfig
from turbosparse.model.gguf import GGUFFile
from turbosparse.predict.budget import affordable, ffn_bytes, kinds_of
from turbosparse.predict.calibrate import price_for
from turbosparse.predict.end_to_end import Aim, refine
from turbosparse.predict.finish import by_price, by_shift, curves, stored
from turbosparse.predict.measure import Curve
from turbosparse.predict.pace import by_clock
from turbosparse.predict.ranks import cost, share_out
from turbosparse.predict.sensitivity import sensitivities
from turbosparse.predict.stack import Stack
from turbosparse.predict.together import Ground, Text, learn
from turbosparse.predict.verdict import judge
from turbosparse.predict.whole import Whole
from turbosparse.predict.write import StoredPredictor

LADDER = (32, 64, 128, 256, 384)  # ranks of the quick fits
SHARES = {"p10": 0.10, "p05": 0.052, "p20": 0.20}
RECALLS = (0.95, 0.96, 0.97, 0.98, 0.99)
QUICK, FITS = 0.06, 0.28  # of the time
# name: (from, share of the time, neurons selected over those that fire, weight of the layers' own loss)
REFINED = {
    "p10-end": ("p10", 0.24, 1.5, 1.0),
    "p10-end-free": ("p10", 0.14, 1.5, 0.1),
    "p20-end": ("p20", 0.12, 1.4, 1.0),
}
TOKENS, TOKENS_END = 4096, 8192  # of a step


class Run:
    """One run: the model, its text, and what has been found."""

    def __init__(self, file: GGUFFile, data: Path, out: Path, seconds: float, device: torch.device) -> None:
        self.begin, self.seconds, self.out = time.monotonic(), seconds, out
        self.file, self.config = file, ModelConfig.from_gguf(file)
        self.train, tuned, measured = (self._load(data / f"{name}.npz") for name in ("train", "tuned", "measured"))
        self.whole = Whole(file, self.config, device)
        few = self.train[:: max(1, len(self.train) // 16)][:16].tolist()
        worth = sensitivities(file, self.config, few, device, lambda done: None)
        ground = self.train[1 :: max(1, len(self.train) // 40)][:40]
        self.ground = Ground(self.whole, ground, [layer.to(device) for layer in worth])
        self.tuned, self.measured = self.whole.watch(tuned[:32]), self.whole.watch(measured[:24])
        self.judged = measured[:32]
        self.kinds = kinds_of(file, self.config)
        self.log: dict[str, Any] = {"torch": torch.__version__, "device": str(device), "phases": {}, "results": {}}

    def note(self, phase: str, **found: object) -> None:
        """Write the log with what a phase found."""
        self.log["phases"][phase] = {"at": round(time.monotonic() - self.begin, 2), **found}
        partial = self.out / "log.json.partial"
        partial.write_text(json.dumps(self.log, indent=1))
        os.replace(partial, self.out / "log.json")

    def ranks(self) -> dict[str, list[int]]:
        """Of all layers for every share, from quick fits of one rank for all layers each."""
        layers = self.config.n_layers
        stacks = [self.ground.begin([rank] * layers, self.kinds, 1) for rank in LADDER]
        self.fit("quick fits", stacks, QUICK)
        found = [curves(stored(stack, self.ground), self.ground, self.tuned) for stack in stacks]
        price = price_for(found[2], 0.98)
        costs = [[cost(of_rank[layer], price) for of_rank in found] for layer in range(layers)]
        blocks = {name: affordable(self.file, self.config, self.kinds, share) for name, share in SHARES.items()}
        return {name: share_out(LADDER, costs, of) for name, of in blocks.items()}

    def fit(self, phase: str, stacks: Sequence[Stack], share: float) -> None:
        """Layer by layer, for a share of the time."""
        text = Text(self.train, max(1, TOKENS // self.train.shape[1]), 2)
        steps = learn(self.whole, self.ground, stacks, text, by_clock(share * self.seconds), lambda done: None)
        self.note(phase, steps=steps)

    def refine(self, name: str, stack: Stack, base: Sequence[float], share: float, aim: Aim) -> None:
        """End to end, for a share of the time."""
        divergences: list[float] = []

        def tell(done: float, divergence: float) -> None:
            if divergence == divergence:
                divergences.append(round(divergence, 5))

        text = Text(self.train, max(1, TOKENS_END // self.train.shape[1]), 4)
        pace = by_clock(share * self.seconds)
        steps = refine(self.whole, self.ground, stack, base, text, pace, aim, tell)
        self.note(name, steps=steps, aim=vars(aim), divergences=divergences)

    def finish(self, name: str, stack: Stack, base: Sequence[float] | None = None) -> tuple[list[float], float]:
        """Store and judge one stack; the thresholds that keep 98 % of |h|, and their price."""
        predictors = stored(stack, self.ground)
        tuned = curves(predictors, self.ground, self.tuned)
        measured = curves(predictors, self.ground, self.tuned, self.measured)
        table = []
        for recall in RECALLS:
            table.append(self._row("price", recall, by_price(tuned, recall)[0], predictors, tuned, measured))
            if base is not None:
                table.append(self._row("shift", recall, by_shift(tuned, base, recall), predictors, tuned, measured))
        index, price = by_price(tuned, 0.98)
        thresholds = [float(layer.score[at]) for layer, at in zip(tuned, index, strict=True)]
        self._save(name, predictors, thresholds)
        whole = sum(ffn_bytes(self.file, layer) for layer in range(self.config.n_layers))
        share = sum(predictor.nbytes for predictor in predictors) / whole
        self.log["results"][name] = {"bytes_share": share, "ranks": list(stack.ranks), "table": table}
        self.note(f"finish {name}")
        return thresholds, price

    def _row(
        self,
        way: str,
        recall: float,
        index: Sequence[int],
        predictors: Sequence[StoredPredictor],
        tuned: Sequence[Curve],
        measured: Sequence[Curve],
    ) -> dict[str, Any]:
        at = [float(layer.score[place]) for layer, place in zip(tuned, index, strict=True)]
        layers = [
            curve.quality(place, layer, predictor.rank, predictor.nbytes / ffn_bytes(self.file, layer))
            for layer, (curve, place, predictor) in enumerate(zip(measured, index, predictors, strict=True))
        ]
        chosen = [replace(each, threshold=score) for each, score in zip(predictors, at, strict=True)]
        verdict = judge(self.whole, chosen, self.judged)
        kept, selected = (
            float(np.mean([getattr(layer, name) for layer in layers])) for name in ("mass_kept", "selected")
        )
        print(f"{way} {recall}: kept {kept:.4f}, selected {selected:.3f}, KL {verdict.kl:.4f}", flush=True)
        row = {"way": way, "recall": recall, "mass_kept": kept, "selected": selected, "thresholds": at}
        return {**row, "verdict": vars(verdict), "layers": [layer.to_json() for layer in layers]}

    def _save(self, name: str, predictors: Sequence[StoredPredictor], thresholds: Sequence[float]) -> None:
        arrays = {f"fc{n}_{layer}": getattr(each, f"fc{n}") for layer, each in enumerate(predictors) for n in (1, 2)}
        partial = self.out / f"partial-{name}.npz"
        ranks, kinds = [each.rank for each in predictors], [int(kind) for kind in self.kinds]
        np.savez(partial, ranks=ranks, kinds=kinds, thresholds=np.float32(thresholds), **arrays)
        os.replace(partial, self.out / f"{name}.npz")

    @staticmethod
    def _load(path: Path) -> Tensor:
        with np.load(path) as saved:
            return torch.from_numpy(saved["w"].astype(np.int64))


def main() -> None:
    """Fit, refine, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "data", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with GGUFFile.open(args.model) as file:
        run = Run(file, args.data, args.out, args.seconds, torch.device(args.device))
        stacks = {name: run.ground.begin(ranks, run.kinds, 1) for name, ranks in run.ranks().items()}
        run.fit("fits", list(stacks.values()), FITS)
        fitted = {name: run.finish(name, stack) for name, stack in stacks.items()}
        for name, (source, share, selected, anchor) in REFINED.items():
            (base, price), stack = fitted[source], stacks[source].clone()
            run.refine(name, stack, base, share, Aim(selected, 4 * price, anchor))
            run.finish(name, stack, base)


if __name__ == "__main__":
    main()
