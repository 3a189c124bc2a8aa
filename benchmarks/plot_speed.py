"""Plot `turbosparse bench --json` results: speed of each mode over llama.cpp's on the dense twin.

python benchmarks/plot_speed.py OUT.svg RESULT.json...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

BASE = "llama.cpp"


def main() -> None:
    """Draw a group of bars for each result, decoding on the left and prompts on the right."""
    results = [json.loads(Path(name).read_text()) for name in sys.argv[2:]]
    modes = list(dict.fromkeys(run["mode"] for result in results for run in result["runs"] if run["mode"] != BASE))
    figure, both = plt.subplots(1, 2, figsize=(max(14, 3.2 * len(results)), 4.5), sharey=True)
    for axes, (what, key) in zip(both, (("decoding", "decode_tok_s"), ("prompt", "prefill_tok_s")), strict=True):
        width = 0.8 / len(modes)
        for index, mode in enumerate(modes):
            places = np.arange(len(results)) + (index - (len(modes) - 1) / 2) * width
            bars = axes.bar(places, [ratio(result, mode, key) for result in results], width, label=mode)
            axes.bar_label(bars, fmt="%.2f", fontsize=7)
        axes.axhline(1.0, color="black", lw=0.8)
        axes.set_xticks(np.arange(len(results)), [label(result) for result in results], fontsize=8)
        axes.set_title(f"{what}, times {BASE} on the dense twin", fontsize=10)
    both[0].legend(fontsize=8)
    machine = results[0]["machine"]
    figure.suptitle(f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(sys.argv[1])


def ratio(result: dict, mode: str, key: str) -> float:
    """Speed of a mode over the base's; not a number where it was not run."""
    speeds = {run["mode"]: run[key] for run in result["runs"]}
    return speeds.get(mode, float("nan")) / speeds[BASE]


def label(result: dict) -> str:
    """The name of a result under its bars."""
    kind = "synthetic, " if result["synthetic"] else ""
    return "\n".join([*result["name"].split(", "), f"{kind}prompt of {result['prompt_tokens']}"])


if __name__ == "__main__":
    main()
