"""Time recovery training and hold it to what the GPU could do: tokens/s, share of peak, and where the time goes.

    python benchmarks/training_speed.py MODEL TEXT WORK [--context 2048] [--case dense,drelu,teacher] [--soft-slopes]

MODEL: a dense Hugging Face folder, whose weights do not matter here (config.json and tokenizer are enough); TEXT: any
JSONL text. Cases: `dense`, the control; `drelu`, with sparsity log and penalty; `teacher`, that and distillation.
A token costs 6 floating-point operations a weight of the matrix products (embedding look-up excluded, output matrix
included), 6 * context * heads * head size a layer for causal attention; a teacher's forward pass a third of that.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from turbosparse.relufy.convert import convert
from turbosparse.relufy.trainer import RecoveryTrainer, train_from_recipe

_PEAK = 989e12  # bf16 operations/s of an H100 SXM or H200, dense, by its data sheet


def flops_per_token(config: Any, context: int) -> float:
    """Forward and backward pass of one token."""
    d, head = config.hidden_size, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = d * head * 2 * (config.num_attention_heads + config.num_key_value_heads)
    weights = config.num_hidden_layers * (attention + 3 * d * config.intermediate_size) + config.vocab_size * d
    return 6.0 * (weights + config.num_hidden_layers * context * config.num_attention_heads * head)


def _folder(model: Path, work: Path) -> tuple[Path, Path]:
    """A dense folder with random weights of the model's shape, and its dReLU swap."""
    dense, sparse = work / "dense", work / "drelu"
    if not dense.exists():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).save_pretrained(dense)
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            if (model / name).exists():
                shutil.copy(model / name, dense)
        convert(dense, sparse)
    return dense, sparse


def _recipe(case: str, options: argparse.Namespace, dense: Path, sparse: Path) -> Path:
    text = [{"domain": "text", "path": str(options.text.resolve())}]
    stage: dict[str, Any] = {
        "name": "train",
        "objective": "cross_entropy",
        "tokens": options.steps * options.batch_tokens,
        "batch_tokens": options.batch_tokens,
        "device_windows": options.batch_tokens // options.context // options.passes,
        "learning_rate": 1e-4,
    }
    if case != "dense":
        stage |= {"sparsity": {"target_rate": 0.1}, "soft_slopes": options.soft_slopes}
    if case == "teacher":
        stage["distillation"] = {"teacher": str(dense), "share": 0.8}
    recipe = {
        "model": str(dense if case == "dense" else sparse),
        "output": str(options.work / "runs" / case),
        "data": {"context": options.context, "cache": "tokens", "sources": text, "validation": text},
        "stages": [stage],
        "log_every": 10,
    }
    path = options.work / f"{case}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def _profiled(path: Path, out: Path) -> None:
    """Train under the profiler; steps 30 to 33 are recorded."""
    original = RecoveryTrainer.training_step
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(
        activities=activities, schedule=torch.profiler.schedule(wait=29, warmup=1, active=4)
    ) as profile:

        def step(*args: Any, **kwargs: Any) -> Any:
            loss = original(*args, **kwargs)
            profile.step()
            return loss

        RecoveryTrainer.training_step = step  # type: ignore[method-assign]
        train_from_recipe(path)
    RecoveryTrainer.training_step = original  # type: ignore[method-assign]
    table = profile.key_averages().table(sort_by="self_cuda_time_total", row_limit=60, max_name_column_width=90)
    out.write_text(table)


def measure(case: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one case; returns its figures."""
    dense, sparse = _folder(options.model, options.work)
    path = _recipe(case, options, dense, sparse)
    shutil.rmtree(options.work / "runs" / case, ignore_errors=True)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if options.profile:
        _profiled(path, options.work / f"{case}.profile.txt")
    else:
        train_from_recipe(path)
    log = [
        json.loads(line) for line in (options.work / "runs" / case / "1-train" / "log.jsonl").read_text().splitlines()
    ]
    speeds = sorted(record["tokens_per_second"] for record in log[2:] if "tokens_per_second" in record)
    flops = flops_per_token(AutoConfig.from_pretrained(dense), options.context)
    work = flops * (4 / 3 if case == "teacher" else 1)
    speed = speeds[len(speeds) // 2]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "case": case,
        "device": device,
        "context": options.context,
        "batch_tokens": options.batch_tokens,
        "soft_slopes": case != "dense" and options.soft_slopes,
        "tokens_per_second": round(speed),
        "model_flops_per_token": round(work),
        "share_of_peak": round(speed * work / _PEAK, 4),
        "peak_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1) if torch.cuda.is_available() else None,
    }


def main() -> None:
    """Print one JSON line a case."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--batch-tokens", type=int, default=65536)
    parser.add_argument("--passes", type=int, default=1, help="forward passes a step")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--case", default="dense,drelu,teacher")
    parser.add_argument("--soft-slopes", action="store_true", help="of the sparse cases, as the recipes have it")
    parser.add_argument("--profile", action="store_true", help="write WORK/CASE.profile.txt; slower")
    options = parser.parse_args()
    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    for case in options.case.split(","):
        print(json.dumps(measure(case, options)), flush=True)


if __name__ == "__main__":
    main()
