"""Two processes train what one trains: the same batches, gradients averaged, one log, one folder."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from turbosparse.relufy.trainer import train_from_recipe

_STAGES = [
    {"name": "recover", "objective": "cross_entropy", "tokens": 768, "device_windows": 1, "save_every": 5}
    | {"distillation": {"teacher": "dense", "share": 0.5}, "predictability": {"weight": 1.0}},
    {"name": "warm", "objective": "layerwise", "teacher": "dense", "tokens": 512, "sides": "best"}
    | {"sparsity": {"target_rate": 0.2, "weight": 0.5}},
]


def _recipe(folder: Path, output: str, stages: list[dict] = _STAGES, model: str = "drelu") -> Path:
    texts = [{"domain": name, "path": f"{name}.jsonl"} for name in "ab"]
    stages = [{"batch_tokens": 64, "learning_rate": 1e-3, "max_grad_norm": 1e9} | stage for stage in stages]
    data = {"context": 16, "cache": "cache", "sources": texts, "validation": texts}
    path = folder / f"{output}.yaml"
    path.write_text(
        yaml.safe_dump({"model": model, "output": output, "data": data, "stages": stages, "log_every": 1, "workers": 0})
    )
    return path


def _torchrun(processes: int, recipe: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run([*command, "-m", "turbosparse", "train", str(recipe)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("done: True") == 1  # one process reports


@pytest.fixture(scope="module")
def runs(folder: Path) -> tuple[Path, Path]:
    """The output folders of one recipe, trained by one process and by two."""
    train_from_recipe(_recipe(folder, "alone"))
    _torchrun(2, _recipe(folder, "shared"))
    return folder / "alone", folder / "shared"


def _log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_two_processes_take_the_steps_of_one(runs):
    alone, shared = (_log(run / "1-recover") for run in runs)
    assert [record["tokens"] for record in alone] == [record["tokens"] for record in shared]
    for one, two in zip(alone, shared, strict=True):
        for key in {"ce", "ce_a", "ce_b", "mixed_ce", "grad_norm", "sparsity_h", "missed"} & one.keys():
            assert two[key] == pytest.approx(one[key], rel=1e-3), (one["step"], key)


def test_two_processes_end_at_the_weights_of_one(runs):
    alone, shared = (load_file(run / "1-recover" / "model.safetensors") for run in runs)
    start = load_file(runs[0].parent / "drelu" / "model.safetensors")
    for name, weight in alone.items():
        apart, moved = np.linalg.norm(shared[name] - weight), np.linalg.norm(weight - start[name])
        assert apart < 0.02 * moved, name
    assert not list((runs[1] / "1-recover").glob("checkpoint-*"))


def test_two_processes_learn_layer_by_layer(runs):
    alone, shared = (_log(run / "2-warm") for run in runs)
    assert shared[-2]["relative_error"] < shared[0]["relative_error"]
    assert shared[0]["relative_error"] == pytest.approx(alone[0]["relative_error"], rel=0.05)  # means of other shares


def test_two_processes_prune_and_close_the_same_gates(folder: Path):
    """What each does to the model before training, by its own look at it, is the same; and so are all steps."""
    warm = {"name": "warm", "objective": "layerwise", "teacher": "dense", "tokens": 512}
    warm |= {"sides": "mirrored", "width": 2}
    train_from_recipe(_recipe(folder, "mirrored", [warm]))
    less = {"name": "less", "objective": "cross_entropy", "tokens": 1280, "device_windows": 1, "prune": 0.3}
    less |= {"soft_slopes": True, "sparsity": {"start_rate": 0.2, "target_rate": 0.05, "weight": 4.0, "threshold": 0.3}}
    for name in ("less-alone", "less-shared"):
        recipe = _recipe(folder, name, [less], "mirrored/1-warm")
        train_from_recipe(recipe) if name == "less-alone" else _torchrun(2, recipe)
    alone, shared = (_log(folder / name / "1-less") for name in ("less-alone", "less-shared"))
    assert len(alone) > 15
    for one, two in zip(alone, shared, strict=True):
        for key in {"ce", "penalty", "grad_norm", "sparsity_h", "sparsity_gate"} & one.keys():
            assert two[key] == pytest.approx(one[key], rel=5e-3, abs=1e-3), (one["step"], key)


def test_torchrun_of_one_process_trains(folder: Path):
    short = [{"name": "short", "objective": "cross_entropy", "tokens": 64, "device_windows": 4}]
    _torchrun(1, _recipe(folder, "single", short))
    assert (folder / "single" / "1-short" / "model.safetensors").exists()
