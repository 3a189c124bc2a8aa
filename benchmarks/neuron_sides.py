"""What the choice of a dReLU model's first neurons is worth: single layers fitted from each, at equal zeros.

    python benchmarks/neuron_sides.py DENSE OUT.json TEXT.jsonl.zst ... [--layers 5,13,20,27] [--steps 200]
        [--starts none:1,one:1,best:1,pairs:2,mirrored:2,reglu:1] [--rate 0.1]

DENSE: a Hugging Face folder (`turbosparse convert --activation keep`). Of every text a part is trained on and the part
behind it held out. A start is a choice of sides and a width (relufy/allot.py): none leaves the neurons as they are,
reglu as well and has that activation. A layer learns, on the dense model's own states, to give the dense layer's
output, with the penalty of the layerwise stage, or one that lets a share `--rate` of its neurons fire. Printed are, on
held-out text, its relative squared error and its zeros before and after, and the rows of weights that exact mode reads
of it for a token afterwards: all of gate, those of up whose gate is open, those of down that fire.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from turbosparse.evaluate.windows import windows as text_windows
from turbosparse.folders import PlainTokenizer
from turbosparse.relufy.allot import allot_neurons
from turbosparse.relufy.drelu import SparseGLU
from turbosparse.relufy.objective import ffns
from turbosparse.relufy.recipes import Sparsity
from turbosparse.relufy.sparsity import ActivationTap, SparsityPressure

_CONTEXT, _BATCH, _RATE = 1024, 1024, 2e-3
_PENALTY = Sparsity(start_rate=0.25, target_rate=0.15, ramp=0.5, weight=1.0, width=0.05)


def windows(path: Path, tokenizer: Any, count: int) -> Tensor:
    """The first `count` windows of a text, int64 [count, context]."""
    pieces = list(text_windows(PlainTokenizer(tokenizer), path, _CONTEXT, count * _CONTEXT))
    if len(pieces) < count or len(pieces[-1]) < _CONTEXT:
        raise SystemExit(f"{path}: shorter than {count} windows of {_CONTEXT} tokens")
    return torch.tensor(pieces)


@torch.no_grad()
def states(model: Any, windows: Tensor, layers: list[int]) -> dict[int, Tensor]:
    """What the FFNs of some layers see, float32 [tokens, hidden] each."""
    seen: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    hooks = [
        model.model.layers[layer].mlp.register_forward_hook(
            lambda _module, inputs, _output, layer=layer: seen[layer].append(inputs[0].flatten(0, 1))
        )
        for layer in layers
    ]
    for part in windows.split(4):
        model.model(part)
    for hook in hooks:
        hook.remove()
    return {layer: torch.cat(states) for layer, states in seen.items()}


def penalty_at(rate: float) -> Sparsity:
    """A penalty that lets a share `rate` of the neurons fire."""
    return Sparsity(start_rate=min(0.3, 2 * rate), target_rate=rate, ramp=0.4, weight=4.0, width=0.05)


def _sparse(dense: Any, start: str, probes: list[Tensor]) -> list[SparseGLU]:
    """The FFNs of the dense model as sparse ones, their neurons chosen, or left as they are."""
    sides, width = start.split(":")
    student = copy.deepcopy(dense)
    for layer in student.model.layers:
        mlp = layer.mlp
        activation = "reglu" if sides == "reglu" else "drelu"
        layer.mlp = SparseGLU(mlp.gate_proj, mlp.up_proj, mlp.down_proj, activation)
    if sides not in ("none", "reglu"):
        allot_neurons(student, dense, probes, sides=sides, width=float(width))
    mlps: list[SparseGLU] = ffns(student)
    return mlps


@torch.no_grad()
def _measure(mlp: SparseGLU, x: Tensor, y: Tensor) -> dict[str, float]:
    mlp.tap = tap = ActivationTap(mlp.activation, None)
    error = ((mlp(x[None])[0] - y).square().sum() / y.square().sum()).item()
    assert tap.rates is not None
    open_, _, fires = tap.rates.tolist()
    gates, ups, neurons = mlp.gate_proj.out_features, mlp.up_proj.out_features, mlp.down_proj.in_features
    return {"error": error, "zeros": 1 - fires, "open": open_, "rows": gates + open_ * ups + fires * neurons}


def fit(mlp: SparseGLU, x: Tensor, y: Tensor, steps: int, penalty: Sparsity = _PENALTY) -> None:
    """The layerwise stage for one layer: inputs and the dense FFN's outputs, float32 [tokens, hidden]."""
    optimizer = torch.optim.AdamW(mlp.parameters(), lr=_RATE, weight_decay=0.0, betas=(0.9, 0.95))
    pressure, draw = SparsityPressure(penalty), torch.Generator().manual_seed(1)
    mlp.tap = tap = ActivationTap(mlp.activation, "count")
    for step in range(steps):
        done = step / steps
        for group in optimizer.param_groups:
            group["lr"] = _RATE * min(1.0, step / 10) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))
        rows = torch.randint(len(x), (_BATCH,), generator=draw)
        error = (mlp(x[rows][None])[0] - y[rows]).square().sum() / y[rows].square().sum()
        assert tap.rates is not None and tap.soft is not None
        (error + pressure(tap.rates[2], tap.soft, done)).backward()
        optimizer.step()
        optimizer.zero_grad()
    mlp.tap = None


def main() -> None:
    """Fit the layers from every start and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("dense", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--layers", default="5,13,20,27")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument(
        "--windows", type=int, default=12, help="of each text to train on; a third as many are held out"
    )
    parser.add_argument("--starts", default="none:1,one:1,best:1")
    parser.add_argument("--rate", type=float, help="share of the neurons that fire; default: the layerwise stage's")
    options = parser.parse_args()
    penalty = _PENALTY if options.rate is None else penalty_at(options.rate)
    dense = AutoModelForCausalLM.from_pretrained(options.dense, dtype=torch.float32).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(options.dense)
    layers = [int(layer) for layer in options.layers.split(",")]
    parts = [windows(text, tokenizer, options.windows * 4 // 3) for text in options.texts]
    train, held = torch.cat([p[: options.windows] for p in parts]), torch.cat([p[options.windows :] for p in parts])
    x, x_held = states(dense, train, layers), states(dense, held, layers)
    rows = []
    for start in options.starts.split(","):
        mlps = _sparse(dense, start, list(train[::4].split(1)))
        for layer in layers:
            mlp, teacher = mlps[layer].requires_grad_(True), dense.model.layers[layer].mlp
            with torch.no_grad():
                y, y_held = teacher(x[layer]), teacher(x_held[layer])
            before = _measure(mlp, x_held[layer], y_held)
            fit(mlp, x[layer], y, options.steps, penalty)
            after = _measure(mlp, x_held[layer], y_held)
            rows.append({"layer": layer, "start": start, "before": before, "after": after})
            print(rows[-1], flush=True)
    options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
