"""Compare ways to make a model sparse: short runs at equal tokens and equal data, in one table.

    python benchmarks/recipe_search.py WORK OUT [--tokens 24000000] [--gpus 2] [--parallel 2] [--minutes 25]
        [--long-tokens 280000000] [--only base,lr-2e-3] [--arm 'NAME={"ffn_lr": 2}']

WORK holds smollm2-135m-dense (`turbosparse convert --activation keep`), the corpus (web/, code/, math/, validation/)
and chat.jsonl; runs lie in WORK/arms, `--parallel` at a time on each GPU, so that one starts up while another trains.
First the dense model learns the corpus at a constant learning rate (`adapt`, all GPUs together): it is where every run
starts. One goes on as it is, its learning rate falling (`control`): what the others are compared with, at the same
number of tokens (a layerwise start counts), and their teacher. OUT gets every run's recipe and log, and table.md. When
the time is up the runs that go on are stopped, and the table says so.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

_DOMAINS = {"web": 0.34, "code": 0.31, "math": 0.325}
_WARM_TOKENS, _BATCH = 4_194_304, 65_536
_LONG_EVAL = 600  # steps
_LONG_SCHEDULE = "warmup_stable_decay"
_PENALTY = {"start_rate": 0.16, "target_rate": 0.096, "ramp": 0.4, "weight": 4.0, "width": 0.02, "threshold": 0.4}
_WARM = {
    "objective": "layerwise",
    "tokens": _WARM_TOKENS,
    "batch_tokens": 16384,
    "learning_rate": 4e-3,
    "weight_decay": 0.0,
    "sparsity": {"start_rate": 0.25, "target_rate": 0.15, "ramp": 0.5, "weight": 1.0, "width": 0.05},
}
_TRAIN = {
    "objective": "cross_entropy",
    "batch_tokens": _BATCH,
    "device_windows": 32,
    "learning_rate": 1e-3,
    "final_lr_share": 0.0,
}
_SPARSE = {"sparsity": _PENALTY, "distillation": {"share": 0.8}}


@dataclass
class Run:
    """One training run: what it starts from (a run or a folder of WORK), who teaches it, and its stage."""

    start: str
    stage: dict[str, Any]
    teacher: str | None = None
    activation: str | None = None  # to swap in first
    spent: int = 0  # tokens of the runs that it starts from, which its own are shortened by
    long: bool = False
    gpus: int = field(default=1, repr=False)


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes`, mapping by mapping."""
    merged = dict(base)
    for key, value in changes.items():
        merged[key] = _merged(base[key], value) if isinstance(value, dict) and key in base else value
    return merged


def _warm(sides: str | None = "best", **changes: Any) -> Run:
    activation = changes.pop("activation", "drelu")
    return Run("adapt", _merged(_WARM, {"sides": sides} | changes), teacher="adapt", activation=activation)


def _arm(start: str = "warm", spent: int = _WARM_TOKENS, long: bool = False, **changes: Any) -> Run:
    teacher = "control-long" if long else "control"
    if long:
        changes |= {"eval_every": _LONG_EVAL, "schedule": _LONG_SCHEDULE}
    return Run(
        start, _merged(_TRAIN | {"device_windows": 16} | _SPARSE, changes), teacher=teacher, spent=spent, long=long
    )


def _runs(adapt_tokens: int, gpus: int) -> dict[str, Run]:
    """Every run by name, the more telling first."""
    adapt = _TRAIN | {"tokens": adapt_tokens, "schedule": "constant"}
    dense = _TRAIN | {"warmup": 0.0}
    best: dict[str, Any] = {"soft_slopes": True, "batch_tokens": 32768}
    return {
        "adapt": Run("smollm2-135m-dense", adapt, gpus=gpus),
        "control": Run("adapt", dense),
        "warm": _warm(),
        "warm-one-side": _warm("one"),
        "base": _arm(),
        "one-side": _arm("warm-one-side"),
        "warm-soft": _warm(soft_slopes=True),
        "after-warm-soft": _arm("warm-soft", soft_slopes=True),
        "soft": _arm(soft_slopes=True),
        "batch-32k": _arm(batch_tokens=32768),
        "lr-2e-3": _arm(learning_rate=2e-3),
        "all-three": _arm("warm-soft", soft_slopes=True, batch_tokens=32768, learning_rate=2e-3),
        "soft-32k": _arm("warm-soft", **best),
        "watched": _arm("warm-soft", predictability={"weight": 0.0}, **best),
        "predictable": _arm("warm-soft", predictability={"weight": 1.0}, **best),
        "batch-16k": _arm(batch_tokens=16384),
        "control-long": Run("adapt", dense | {"eval_every": _LONG_EVAL, "schedule": _LONG_SCHEDULE}, long=True),
        "base-long": _arm(long=True),
        "warm-12M": _warm(tokens=3 * _WARM_TOKENS),
        "after-warm-12M": _arm("warm-12M", 3 * _WARM_TOKENS),
        "teacher-only": _arm(distillation={"share": 1.0}),
        "share-0.5": _arm(distillation={"share": 0.5}),
        "ffn-lr-2": _arm(ffn_lr=2.0),
        "zeros-95": _arm(sparsity={"target_rate": 0.048}),
        "late-ramp": _arm(sparsity={"ramp": 0.8}),
        "threshold-0": _arm(sparsity={"threshold": None}),
        "threshold-0.8": _arm(sparsity={"threshold": 0.8}),
        "control-32k": Run("adapt", dense | {"batch_tokens": 32768}),
        "control-lr-2e-3": Run("adapt", dense | {"learning_rate": 2e-3}),
        "control-lr-5e-4": Run("adapt", dense | {"learning_rate": 5e-4}),
        "warm-reglu": _warm(None, activation="reglu"),
        "reglu": _arm("warm-reglu"),
    }


class Search:
    """The folders of one search and the processes that run in them."""

    def __init__(self, work: Path, out: Path, runs: dict[str, Run], tokens: int, long_tokens: int) -> None:
        self.work, self.out, self.runs, self.tokens, self.long_tokens = work, out, runs, tokens, long_tokens
        self.folder = work / "arms"
        self.failed: set[str] = set()
        for folder in (self.folder, out):
            folder.mkdir(parents=True, exist_ok=True)

    def made(self, name: str) -> Path:
        """The folder that a run leaves, or one that is there from the start."""
        return self.folder / name / "1-train" if name in self.runs else self.work / name

    def stage(self, run: Run) -> dict[str, Any]:
        """The run's stage of a recipe, with its teacher and its tokens."""
        stage = {"name": "train", **run.stage}
        if stage["objective"] == "layerwise":
            stage["teacher"] = str(self.made(str(run.teacher)))
        elif "distillation" in stage:
            stage["distillation"] = stage["distillation"] | {"teacher": str(self.made(str(run.teacher)))}
        stage.setdefault("tokens", (self.long_tokens if run.long else self.tokens) - run.spent)
        return stage

    def recipe(self, name: str, model: Path) -> Path:
        """Write the recipe of one run; its folder and its log carry its name."""
        held = self.work / "validation"
        sources = [
            {"domain": domain, "path": str(self.work / domain / "*.jsonl.zst"), "weight": weight}
            for domain, weight in _DOMAINS.items()
        ]
        sources.append({"domain": "chat", "path": str(self.work / "chat.jsonl"), "weight": 0.025})
        recipe = {
            "model": str(model),
            "output": str(self.folder / name),
            "seed": 11,
            "data": {
                "context": 1024,
                "cache": str(self.work / "tokens"),
                "sources": sources,
                "validation": [{"domain": d, "path": str(held / f"{d}.jsonl.zst")} for d in _DOMAINS],
            },
            "stages": [self.stage(self.runs[name])],
            "log_every": 40,
        }
        path = self.out / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
        return path

    def begin(self, name: str, gpu: int) -> subprocess.Popen[bytes]:
        """Start a run in a process of its own, on one GPU or on all."""
        run = self.runs[name]
        model = self.made(run.start)
        if run.activation:
            swap = self.folder / f"swap-{run.activation}"
            if not swap.exists():
                command = [sys.executable, "-m", "turbosparse", "convert", str(model), str(swap)]
                subprocess.run([*command, "--activation", run.activation], check=True, stdout=subprocess.DEVNULL)
            model = swap
        launcher = [sys.executable]
        if run.gpus > 1:
            launcher = ["torchrun", "--nproc-per-node", str(run.gpus)]
        command = [*launcher, "-m", "turbosparse", "train", str(self.recipe(name, model)), "--resume"]
        visible = {} if run.gpus > 1 else {"CUDA_VISIBLE_DEVICES": str(gpu)}
        with (self.out / f"{name}.err").open("wb") as errors:
            return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env={**os.environ, **visible})

    def ready(self, name: str) -> bool:
        """Whether everything that a run needs is there."""
        run = self.runs[name]
        return all(self.made(need).exists() for need in (run.start, run.teacher) if need)

    def work_off(self, gpus: int, parallel: int, deadline: float) -> None:
        """Do the runs, `parallel` at a time on each GPU, the first that can start first, until the deadline."""
        running: dict[str, tuple[int, subprocess.Popen[bytes]]] = {}
        waiting = [name for name in self.runs if not self.made(name).exists()]
        while (running or any(map(self.ready, waiting))) and time.monotonic() < deadline:
            for name in [name for name, (_, process) in running.items() if process.poll() is not None]:
                if running.pop(name)[1].returncode:
                    self.failed.add(name)
                    print(f"{name} failed:", (self.out / f"{name}.err").read_text()[-600:], file=sys.stderr, flush=True)
                self.table()
            load = {gpu: sum(at == gpu for at, _ in running.values()) for gpu in range(gpus)}
            gpu = min(load, key=lambda gpu: load[gpu])
            name = next((name for name in waiting if self.ready(name)), None)
            if name is not None and load[gpu] < parallel:
                waiting.remove(name)
                running[name] = gpu, self.begin(name, gpu)
            else:
                time.sleep(0.5)
        for _, process in running.values():
            process.terminate()  # not kill(): torchrun then ends its workers
        for _, process in running.values():
            process.wait()
        self.table()

    def collect(self, name: str) -> dict[str, Any] | None:
        """Copy the log of a run to OUT; returns its last validation and how far it came, None if it never began."""
        folder = self.made(name)
        done = folder.exists()
        log = (folder if done else folder.with_name(folder.name + ".partial")) / "log.jsonl"
        if not log.exists():
            return None
        shutil.copy(log, self.out / f"{name}.jsonl")
        records = [json.loads(line) for line in log.read_text().splitlines()]
        if not records:
            return None
        last = next((r for r in reversed(records) if "validation" in r), None)
        row = {"name": name, "done": done, "tokens": records[-1]["tokens"]}
        if last:
            row |= last["mean"] | {domain: result["ce"] for domain, result in last["validation"].items()}
        return row

    def table(self) -> None:
        """Write table.md."""
        keys = ["web", "code", "math", "ce", "sparsity_h", "sparsity_gate", "min_layer_sparsity_h", "selected_98"]
        heads = ["run", "tokens", *keys[:3], "mean", "zeros", "gate closed", "least layer", "selected for 98 %"]
        lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
        for row in filter(None, map(self.collect, self.runs)):
            cells = [f"{row[key]:.4f}" if key in row else "-" for key in keys]
            note = "" if row["done"] else " (failed)" if row["name"] in self.failed else " (not finished)"
            lines.append("| " + " | ".join([row["name"] + note, f"{row['tokens'] / 1e6:.1f}M", *cells]) + " |")
        partial = self.out / "table.md.partial"
        partial.write_text("\n".join(lines) + "\n")
        os.replace(partial, self.out / "table.md")


def _with_needs(names: list[str], runs: dict[str, Run]) -> dict[str, Run]:
    """The named runs and those that they start from or learn from, in the order of `runs`."""
    wanted, open_names = set[str](), list(names)
    while open_names:
        name = open_names.pop()
        if name in runs and name not in wanted:
            wanted.add(name)
            open_names += [need for need in (runs[name].start, runs[name].teacher) if need]
    return {name: run for name, run in runs.items() if name in wanted}


def main() -> None:
    """Do the runs, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=24_000_000, help="of a run, its layerwise start included")
    parser.add_argument("--long-tokens", type=int, default=72_000_000, help="the same, of the long runs")
    parser.add_argument("--adapt-tokens", type=int, default=40_000_000)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time on each GPU")
    parser.add_argument("--minutes", type=float, default=25.0, help="from now; what runs then is stopped")
    parser.add_argument("--only", help="names of runs, with commas; default: all")
    parser.add_argument("--arm", action="append", default=[], help="NAME=JSON, what it changes in `base`")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    runs = _runs(options.adapt_tokens, options.gpus)
    names = options.only.split(",") if options.only else list(runs)
    for arm in options.arm:
        name, _, changes = arm.partition("=")
        runs[name] = _arm(**json.loads(changes))
        names.append(name)
    search = Search(
        options.work.resolve(), options.out.resolve(), _with_needs(names, runs), options.tokens, options.long_tokens
    )
    search.work_off(options.gpus, options.parallel, deadline)
    print((search.out / "table.md").read_text())


if __name__ == "__main__":
    main()
