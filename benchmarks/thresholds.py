"""What a threshold costs: zero small activations of a trained sparse model and look at its loss.

    python benchmarks/thresholds.py FOLDER TEXT.jsonl.zst ... [--windows 4] [--thresholds 0,0.02,0.05,0.1]

A neuron's h is zeroed where it is below a threshold times the root mean square of its layer's h over the window: a
shifted ReLU after training (ReLU strikes back, arXiv 2310.04564; ProSparse, arXiv 2402.13516). Prints cross-entropy and
zeros, mean over the texts, one line a threshold. FOLDER: as `turbosparse train` writes it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import turbosparse  # noqa: F401  registers the sparse models
from turbosparse.relufy.data import validation_windows
from turbosparse.relufy.drelu import ACTIVATIONS
from turbosparse.relufy.recipes import TextSource


class Thresholded:
    """An activation that zeroes what is small, and counts what is left."""

    def __init__(self, activation: Callable[[Tensor, Tensor], Tensor], threshold: float) -> None:
        self._activation, self._threshold = activation, threshold
        self.zeros = self.count = 0

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        h = self._activation(gate, up)
        h = h.masked_fill(h.abs() < self._threshold * h.square().mean().sqrt(), 0.0)
        self.zeros += int((h == 0).sum())
        self.count += h.numel()
        return h


@torch.no_grad()
def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--windows", type=int, default=4, help="of 1024 tokens, from each text")
    parser.add_argument("--thresholds", default="0,0.02,0.05,0.1,0.2,0.3")
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    cache = options.folder / "tokens"
    texts = [
        validation_windows(TextSource(domain=path.stem, path=str(path)), tokenizer, cache, 1024)[: options.windows]
        for path in options.texts
    ]
    print("| threshold | cross-entropy | zeros |\n| --- | --- | --- |")
    for threshold in map(float, options.thresholds.split(",")):
        activation = Thresholded(ACTIVATIONS[model.config.activation], threshold)
        for layer in model.model.layers:
            layer.mlp.set_threshold(None)  # the row's instead of the model's own
            layer.mlp._combine = activation
        losses = [model(row[None], labels=row[None]).loss.item() for windows in texts for row in windows]
        zeros = activation.zeros / activation.count
        print(f"| {threshold:g} | {sum(losses) / len(losses):.4f} | {zeros:.2%} |", flush=True)


if __name__ == "__main__":
    main()
