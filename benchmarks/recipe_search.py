"""Compare ways to make a model sparse: short arms at equal tokens and equal data, in one table.

    python benchmarks/recipe_search.py WORK OUT [--tokens 20000000] [--parallel 2] [--minutes 25] [--only base,muon]
        [--arm 'NAME={"optimizer": "muon"}']

WORK holds smollm2-135m-dense (`turbosparse convert --activation keep`), the corpus (web/, code/, math/, validation/)
and chat.jsonl; arms run in WORK/arms, `--parallel` at a time, so that one starts up while another trains. First the
dense model learns the corpus at a constant learning rate (`adapt`): it is where every arm starts. One arm goes on as it
is, its learning rate falling (`control`): what the others are compared with, at the same number of tokens, and their
teacher. OUT gets every arm's recipe and log, and table.md. When the time is up the running arms are left unfinished,
and the table says so.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

_DOMAINS = {"web": 0.34, "code": 0.31, "math": 0.325}
_WARM_TOKENS, _BATCH = 4_194_304, 65_536
_PENALTY = {"start_rate": 0.16, "target_rate": 0.098, "ramp": 0.4, "weight": 4.0, "width": 0.02}
_WARM = {
    "name": "warm",
    "objective": "layerwise",
    "tokens": _WARM_TOKENS,
    "batch_tokens": 16384,
    "learning_rate": 4e-3,
    "weight_decay": 0.0,
    "align_signs": True,
    "sparsity": {"start_rate": 0.25, "target_rate": 0.15, "ramp": 0.5, "weight": 1.0, "width": 0.05},
}
_TRAIN = {
    "name": "train",
    "objective": "cross_entropy",
    "batch_tokens": _BATCH,
    "device_windows": 32,  # 23 GB: three arms fit on one GPU
    "learning_rate": 1e-3,
    "final_lr_share": 0.0,
}


def _arms(teacher: str) -> dict[str, dict[str, Any]]:
    """Name of each arm to what differs from `_TRAIN`; `start` is where it begins: warm, swap or dense."""
    learn = {"teacher": teacher, "share": 0.8}
    base = {"start": "warm", "sparsity": _PENALTY, "distillation": learn}
    without_teacher = {"start": "warm", "sparsity": _PENALTY}
    return {
        "base": base,
        "lr-2e-3": {**base, "learning_rate": 2e-3},
        "lr-5e-4": {**base, "learning_rate": 5e-4},
        "batch-32k": {**base, "batch_tokens": _BATCH // 2, "learning_rate": 7e-4},
        "batch-131k": {**base, "batch_tokens": 2 * _BATCH, "learning_rate": 1.4e-3},
        "hidden": {**base, "distillation": {**learn, "hidden": 1.0}},
        "muon": {**base, "optimizer": "muon"},
        "control-lr-5e-4": {"start": "dense", "learning_rate": 5e-4},
        "control-lr-2e-3": {"start": "dense", "learning_rate": 2e-3},
        "control-muon": {"start": "dense", "optimizer": "muon"},
        "no-teacher": without_teacher,
        "teacher-only": {**base, "distillation": {**learn, "share": 1.0}},
        "plain-swap": {**without_teacher, "start": "swap"},
        "staged-l1": {**base, "sparsity": {**_PENALTY, "penalty": "l1"}},
        "threshold-0.2": {**base, "sparsity": {**_PENALTY, "threshold": 0.2}},
        "threshold-0.4": {**base, "sparsity": {**_PENALTY, "threshold": 0.4}},
        "late-ramp": {**base, "sparsity": {**_PENALTY, "ramp": 0.8}},
        "zeros-86": {**base, "sparsity": {**_PENALTY, "target_rate": 0.138}},
        "zeros-95": {**base, "sparsity": {**_PENALTY, "target_rate": 0.048}},
    }


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes`, mapping by mapping."""
    merged = dict(base)
    for key, value in changes.items():
        merged[key] = _merged(base[key], value) if isinstance(value, dict) and key in base else value
    return merged


def _chosen(options: argparse.Namespace, teacher: str) -> dict[str, dict[str, Any]]:
    """The arms that the command line asks for, in its order: named ones, then those of --arm, changes of `base`."""
    arms = _arms(teacher)
    chosen = {name: arms[name] for name in (options.only.split(",") if options.only else arms)}
    for arm in options.arm:
        name, _, changes = arm.partition("=")
        chosen[name] = _merged(arms["base"], json.loads(changes))
    return chosen


class Search:
    """The folders of one search and the processes that run in them."""

    def __init__(self, work: Path, out: Path, tokens: int, adapt_tokens: int, deadline: float) -> None:
        self.work, self.out, self.tokens, self.adapt_tokens, self.deadline = work, out, tokens, adapt_tokens, deadline
        self.arms_folder = work / "arms"
        self.adapted = self.arms_folder / "adapt" / "1-adapt"
        self.control = self.arms_folder / "control" / "1-train"
        self.failed: set[str] = set()
        for folder in (self.arms_folder, out):
            folder.mkdir(parents=True, exist_ok=True)

    def recipe(self, name: str, model: str, stage: dict[str, Any]) -> Path:
        """Write the recipe of one arm; its folder and its log carry its name."""
        held = self.work / "validation"
        sources = [
            {"domain": domain, "path": str(self.work / domain / "*.jsonl.zst"), "weight": weight}
            for domain, weight in _DOMAINS.items()
        ]
        sources.append({"domain": "chat", "path": str(self.work / "chat.jsonl"), "weight": 0.025})
        recipe = {
            "model": model,
            "output": str(self.arms_folder / name),
            "seed": 11,
            "data": {
                "context": 1024,
                "cache": str(self.work / "tokens"),
                "sources": sources,
                "validation": [{"domain": d, "path": str(held / f"{d}.jsonl.zst")} for d in _DOMAINS],
            },
            "stages": [stage],
            "log_every": 40,
        }
        path = self.out / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
        return path

    def start(self, name: str, model: str, stage: dict[str, Any]) -> subprocess.Popen[bytes]:
        """Begin an arm in a process of its own."""
        command = [sys.executable, "-m", "turbosparse", "train", str(self.recipe(name, model, stage)), "--resume"]
        with (self.out / f"{name}.err").open("wb") as errors:
            return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)

    def collect(self, name: str, stage: str) -> dict[str, Any]:
        """Copy the log of an arm to OUT; returns its last validation and how far it came."""
        folder = self.arms_folder / name / f"1-{stage}"
        done = folder.exists()
        log = (folder if done else folder.with_name(folder.name + ".partial")) / "log.jsonl"
        if not log.exists():
            return {"name": name, "done": False}
        shutil.copy(log, self.out / f"{name}.jsonl")
        records = [json.loads(line) for line in log.read_text().splitlines()]
        speeds = sorted(r["tokens_per_second"] for r in records if "tokens_per_second" in r)
        last = next((r for r in reversed(records) if "validation" in r), None)
        row = {"name": name, "done": done, "tokens": records[-1]["tokens"]}
        if speeds:
            row["tok_s"] = speeds[len(speeds) // 2]
        if last:
            row |= last["mean"] | {domain: result["ce"] for domain, result in last["validation"].items()}
        return row

    def finish(self, name: str, process: subprocess.Popen[bytes]) -> None:
        """Wait for an arm that the others need."""
        if process.wait():
            raise SystemExit((self.out / f"{name}.err").read_text()[-3000:])

    def run(self, name: str, model: str, stage: dict[str, Any]) -> None:
        """Run one arm to its end before anything else."""
        self.finish(name, self.start(name, model, stage))

    def prepare(self) -> None:
        """The dense model that every arm starts from, the control, the swap, and its layerwise start."""
        adapt = _TRAIN | {"name": "adapt", "tokens": self.adapt_tokens, "schedule": "constant"}
        self.run("adapt", str(self.work / "smollm2-135m-dense"), adapt)
        tokens = self.tokens + _WARM_TOKENS
        control = self.start("control", str(self.adapted), _TRAIN | {"tokens": tokens, "warmup": 0.0})
        swap = self.arms_folder / "swap"
        if not swap.exists():
            subprocess.run(
                [sys.executable, "-m", "turbosparse", "convert", str(self.adapted), str(swap)],
                check=True,
                stdout=subprocess.DEVNULL,
            )
        self.run("warm", str(swap), _WARM | {"teacher": str(self.adapted)})
        self.finish("control", control)

    def run_arms(self, arms: dict[str, dict[str, Any]], parallel: int) -> None:
        """Run the arms in order, `parallel` at a time, until the deadline."""
        starts = {
            "warm": self.arms_folder / "warm" / "1-warm",
            "swap": self.arms_folder / "swap",
            "dense": self.adapted,
        }
        names: list[str] = list(arms)
        running: dict[str, subprocess.Popen[bytes]] = {}
        waiting = list(names)
        while (waiting or running) and time.monotonic() < self.deadline:
            for name in [name for name, process in running.items() if process.poll() is not None]:
                if running.pop(name).returncode:
                    self.failed.add(name)
                    print(f"{name} failed:", (self.out / f"{name}.err").read_text()[-300:], file=sys.stderr, flush=True)
                self.table(names)
            while waiting and len(running) < parallel:
                name = waiting.pop(0)
                stage = copy.deepcopy(_TRAIN) | arms[name]
                start = stage.pop("start")
                stage["tokens"] = self.tokens + (0 if start == "warm" else _WARM_TOKENS)
                running[name] = self.start(name, str(starts[start]), stage)
            time.sleep(0.5)
        for process in running.values():
            process.kill()
        self.table(names)

    def table(self, names: list[str]) -> None:
        """Write table.md and print it."""
        rows = [self.collect("adapt", "adapt"), self.collect("control", "train"), self.collect("warm", "warm")]
        rows += [self.collect(name, "train") for name in names]
        keys = ["web", "code", "math", "ce", "sparsity_h", "sparsity_gate", "min_layer_sparsity_h"]
        lines = ["| arm | tokens | web | code | math | mean | zeros | gate closed | least layer | tokens/s |"]
        lines.append("|" + " --- |" * 10)
        for row in rows:
            cells = [f"{row[key]:.4f}" if key in row else "-" for key in keys]
            note = "" if row["done"] else " (failed)" if row["name"] in self.failed else " (not finished)"
            tokens, speed = f"{row.get('tokens', 0) / 1e6:.1f}M", f"{row.get('tok_s', 0):.0f}"
            lines.append("| " + " | ".join([row["name"] + note, tokens, *cells, speed]) + " |")
        partial = self.out / "table.md.partial"
        partial.write_text("\n".join(lines) + "\n")
        os.replace(partial, self.out / "table.md")


def main() -> None:
    """Prepare, run the arms, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=20_000_000, help="of an arm, after the layerwise start")
    parser.add_argument("--adapt-tokens", type=int, default=60_000_000)
    parser.add_argument("--parallel", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=25.0, help="from now; what runs then is stopped")
    parser.add_argument("--only", help="names of arms, with commas; default: all")
    parser.add_argument("--arm", action="append", default=[], help="NAME=JSON, what it changes in `base`")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    search = Search(options.work.resolve(), options.out.resolve(), options.tokens, options.adapt_tokens, deadline)
    search.prepare()
    search.run_arms(_chosen(options, str(search.control)), options.parallel)
    print((search.out / "table.md").read_text())


if __name__ == "__main__":
    main()
