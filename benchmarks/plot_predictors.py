"""Plot a result of predictor_kinds.py: what each kind reads of the FFNs, against what the model's output loses.

python benchmarks/plot_predictors.py OUT.svg RESULT.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt


def main() -> None:
    """A point for each kind and wish; those that no other beats in both are joined."""
    record = json.loads(Path(sys.argv[2]).read_text())
    points = [(100 * found["bytes_read"], found["kl"], found["kind"]) for found in record["kinds"]]
    figure, axes = plt.subplots(figsize=(10, 6.5))
    for name in dict.fromkeys(name for _, _, name in points):
        ours = sorted(point for point in points if point[2] == name)
        (line,) = axes.plot([x for x, _, _ in ours], [y for _, y, _ in ours], "o-", ms=4, lw=0.6, alpha=0.9)
        axes.annotate(name, ours[-1][:2], (5, 2), textcoords="offset points", fontsize=7, color=line.get_color())
    best = [(x, y) for x, y, _ in points if not any(a <= x and b <= y and (a, b) != (x, y) for a, b, _ in points)]
    axes.plot(*zip(*sorted(best), strict=True), color="black", lw=1.5, alpha=0.4, zorder=0)
    exact = 100 * record["kinds"][0]["exact_bytes_read"]
    axes.axvline(exact, color="black", lw=0.8, ls=":")
    axes.annotate("exact mode", (exact, axes.get_ylim()[1]), (3, -10), textcoords="offset points", fontsize=7)
    axes.set_yscale("log")
    axes.set_xlabel("bytes read per token, predictor included, % of the dense FFNs'")
    axes.set_ylabel("KL divergence from exact mode, nats per token")
    axes.set_title(f"{record['model']}: kinds of predictors; joined in grey: no other is better in both", fontsize=9)
    figure.tight_layout()
    figure.savefig(sys.argv[1])


if __name__ == "__main__":
    main()
