"""The log of a training stage: one JSON line a report in `log.jsonl`, one readable line on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather, reduce
from torch import Tensor

from turbosparse.relufy.processes import this_process
from turbosparse.relufy.recipes import Stage


class ProgressLog:
    """Collects metrics on the device, without waiting for it, and writes their means when the Trainer logs.

    Of several processes, which all have to call it, the first one writes, for all of them.
    """

    def __init__(self, path: Path, stage: Stage, max_steps: int, context: int) -> None:
        self._path, self._stage, self._max_steps = path, stage, max_steps
        self._tokens_per_step = max(1, stage.batch_tokens // context) * context
        self._pending: list[dict[str, Tensor]] = []
        self._last = (time.monotonic(), None)  # type: tuple[float, int | None]

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Keep the metrics of one micro-batch."""
        self._pending.append(metrics)

    def _means(self, domains: list[str]) -> dict[str, float]:
        pending, self._pending = self._pending, []
        if not pending:
            return {}
        scalars = [key for key, value in pending[-1].items() if value.ndim == 0]
        mine = torch.stack([torch.stack([metrics[key] for metrics in pending]).float().mean() for key in scalars])
        means = dict(zip(scalars, reduce(mine, "mean").tolist(), strict=True))
        if "window_ce" in pending[-1]:
            window_ce = gather(torch.cat([metrics["window_ce"] for metrics in pending]))
            domain = gather(torch.cat([metrics["domain"] for metrics in pending]))
            for index, name in enumerate(domains):
                windows = window_ce[domain == index]
                if windows.numel():
                    means[f"ce_{name}"] = windows.mean().item()
        return means

    def write(self, step: int, logs: Mapping[str, float], domains: list[str]) -> None:
        """One report: the means since the last one, the learning rate and the speed in tokens/s."""
        now, (then, last_step) = time.monotonic(), self._last
        self._last = (now, step)
        record: dict[str, Any] = {"step": step, "tokens": step * self._tokens_per_step}
        record |= {key: logs[key] for key in ("loss", "grad_norm", "learning_rate") if key in logs}
        record |= self._means(domains)
        if last_step is not None and now > then:
            record["tokens_per_second"] = (step - last_step) * self._tokens_per_step / (now - then)
        if this_process().is_main_process:
            self._append(record)
            self._show(record)

    def write_validation(
        self, step: int, results: Mapping[str, Mapping[str, float]], mean: Mapping[str, float]
    ) -> None:
        """One validation: every domain's loss and sparsity, and their means."""
        self._last = (time.monotonic(), step)
        if not this_process().is_main_process:
            return
        self._append({"step": step, "tokens": step * self._tokens_per_step, "validation": results, "mean": mean})
        losses = "  ".join(f"{domain} {result['ce']:.4f}" for domain, result in results.items())
        zeros = f"  zeros {mean['sparsity_h']:.2%}" if "sparsity_h" in mean else ""
        if "selected_98" in mean:
            zeros += f"  selected for 98 % of |h| {mean['selected_98']:.2f}"
        print(f"{self._stage.name} {step:6d}  validation  {losses}  mean {mean['ce']:.4f}{zeros}", file=sys.stderr)

    def _append(self, record: Mapping[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(record) + "\n")

    def _show(self, record: Mapping[str, Any]) -> None:
        step, speed = record["step"], record.get("tokens_per_second")
        parts = [f"{self._stage.name} {step:6d}/{self._max_steps}  loss {record['loss']:.4f}"]
        parts += [f"{key} {record[key]:.4f}" for key in ("ce", "relative_error", "penalty", "missed") if key in record]
        if "sparsity_h" in record:
            parts.append(f"zeros {record['sparsity_h']:.2%}")
        if speed:
            left = (self._max_steps - step) * self._tokens_per_step / speed
            parts.append(f"{speed:,.0f} tok/s  {left / 60:.1f} min left")
        print("  ".join(parts), file=sys.stderr, flush=True)
