"""What the swap to dReLU costs before the recovery, by the width of the student: nats on held-out text, and zeros.

    python benchmarks/swap_width.py DENSE OUT.json TEXT.jsonl.zst ... --held VALIDATION.jsonl.zst ...
        [--widths 1,2,4] [--steps 200 --rate 0.1] [--windows 24] [--save FOLDER]

DENSE: a Hugging Face folder (`turbosparse convert --activation keep`). The student's neurons are the best sides of the
dense ones (relufy/allot.py). With `--steps`, every layer then learns by itself, on the dense model's own states, to
give the dense layer's output with a share `--rate` of its neurons. `--save` keeps the students, for `turbosparse eval`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from neuron_sides import fit, penalty_at, states, windows
from torch import Tensor
from transformers import AutoTokenizer

from turbosparse.folders import load_model
from turbosparse.relufy.allot import allot_neurons
from turbosparse.relufy.convert import convert
from turbosparse.relufy.objective import ffns
from turbosparse.relufy.validate import mean_over_domains, validate


def _student(dense: Any, folder: Path, width: float, probes: Tensor) -> Any:
    with tempfile.TemporaryDirectory() as place:
        convert(folder, Path(place, "swap"))
        student = load_model(Path(place, "swap"))
    allot_neurons(student, dense, list(probes.split(1)), width=width)
    return student


def _fit_layers(student: Any, dense: Any, x: dict[int, Tensor], steps: int, rate: float) -> None:
    for layer, (mlp, teacher) in enumerate(zip(ffns(student), ffns(dense), strict=True)):
        with torch.no_grad():
            y = teacher(x[layer])
        fit(mlp, x[layer], y, steps, penalty_at(rate))
        print(f"  layer {layer}", flush=True)


def _measure(model: Any, held: dict[str, Tensor]) -> dict[str, float]:
    """Nats a token of each text, their mean, and the share of zeros in h of a sparse model."""
    found = validate(model, held, torch.device("cpu"), None)
    mean = mean_over_domains(found)
    nats = {name: figures["ce"] for name, figures in found.items()} | {"mean": mean["ce"]}
    return nats | ({"zeros": mean["sparsity_h"]} if "sparsity_h" in mean else {})


def main() -> None:
    """Measure the dense model and a student of every width."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("dense", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--held", type=Path, nargs="+", required=True)
    parser.add_argument("--widths", default="1,2,4")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--windows", type=int, default=24, help="of each text; a third of them choose the sides")
    parser.add_argument("--held-windows", type=int, default=6, help="of each held-out text")
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    dense = load_model(options.dense).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(options.dense)
    train = torch.cat([windows(text, tokenizer, options.windows) for text in options.texts])
    held = {path.name.split(".")[0]: windows(path, tokenizer, options.held_windows) for path in options.held}
    x = states(dense, train, list(range(dense.config.num_hidden_layers))) if options.steps else {}
    rows: list[dict[str, Any]] = [{"width": None, **_measure(dense, held)}]
    for width in (float(value) for value in options.widths.split(",")):
        student = _student(dense, options.dense, width, train[::3])
        if options.steps:
            _fit_layers(student, dense, x, options.steps, options.rate)
        rows.append({"width": width, "steps": options.steps, **_measure(student.eval(), held)})
        print(rows[-1], flush=True)
        if options.save is not None:
            student.save_pretrained(options.save / f"width-{width:g}")
            tokenizer.save_pretrained(options.save / f"width-{width:g}")
    options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
