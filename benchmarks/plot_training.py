"""Plot the logs of a training run: loss and sparsity over tokens.

    python benchmarks/plot_training.py RUN_FOLDER OUT.svg

RUN_FOLDER holds one NAME.jsonl a stage, as `turbosparse train` writes them (log.jsonl, renamed).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt


def main() -> None:
    """Draw every stage of the folder into one picture."""
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    figure, (loss, zeros) = plt.subplots(1, 2, figsize=(11, 4))
    for path in sorted(folder.glob("*.jsonl")):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        steps = [record for record in records if "ce" in record]
        checks = [record for record in records if "validation" in record]
        if steps:
            line = loss.plot([r["tokens"] / 1e6 for r in steps], [r["ce"] for r in steps], lw=0.8, alpha=0.6)
            colour = line[0].get_color()
            tokens = [r["tokens"] / 1e6 for r in checks]
            loss.plot(tokens, [r["mean"]["ce"] for r in checks], "o-", color=colour, label=f"{path.stem}, validation")
        sparse = [record for record in records if "sparsity_h" in record]
        if sparse:
            zeros.plot([r["tokens"] / 1e6 for r in sparse], [100 * r["sparsity_h"] for r in sparse], label=path.stem)
    loss.set(xlabel="million tokens", ylabel="cross-entropy, nats per token")
    zeros.set(xlabel="million tokens", ylabel="zeros in h, %")
    for axes in (loss, zeros):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out)


if __name__ == "__main__":
    main()
