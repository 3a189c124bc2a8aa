"""Where a token's time goes: the products of each phase of one layer and of the head, as the engine multiplies them.

    python benchmarks/phases.py --shape mistral-7b [--quant q4_0] [--gate-rate 0.25] [--sparsity 0.9] [--selected 1.2]
        [--threads 2] [--resident]

Each phase runs over several matrices of its shape, more than the last-level cache holds, split over the threads by
rows; between them the read limit is measured anew. With --resident, for models that live in that cache, it runs over
what all layers have of it, again and again, and the limit is that of as many bytes as the model has. ms are those of a
whole token (all layers). What the sum lacks of 1 / (decode tokens/s) of `turbosparse bench` are barriers, norms,
attention's scores and the sums of partial results.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from gguf import GGMLQuantizationType

from turbosparse import _native
from turbosparse._native import kernels
from turbosparse.model.shapes import SHAPES, shape_config
from turbosparse.model.synthetic_rows import Rows, random_rows

PASSES = 7
COLD_BYTES = 400 << 20
RESIDENT_PASSES = 50  # at once, so that starting the threads does not count
NEURON_BLOCKS = 16  # of the engine's down projection


@dataclass(frozen=True)
class Phase:
    """A product: rows x cols, of which `share` are read (below 1 by a list), by dot products or as a sum of rows."""

    name: str
    rows: int
    cols: int
    times: int  # a token
    share: float = 1.0
    sums: bool = False

    def of_all_layers(self) -> Phase:
        """The same work in one matrix."""
        return replace(self, rows=self.rows * self.times, times=1)


def phases_of(shape: str, gate_rate: float, active: float, selected: float) -> list[Phase]:
    """The phases of dense, exact and predicted mode, and the down projection of the dense twin."""
    c = shape_config(shape, "drelu")
    ffns = c.n_layers * c.ffns_used
    q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    return [
        Phase("attention q, k, v", q + 2 * kv, c.hidden_size, c.n_layers),
        Phase("attention output", c.hidden_size, q, c.n_layers),
        Phase("gate", c.ffn_size, c.hidden_size, ffns),
        Phase("gate, selected", c.ffn_size, c.hidden_size, ffns, selected),
        Phase("up, open gates", c.ffn_size, c.hidden_size, ffns, gate_rate),
        Phase("down, active", c.ffn_size, c.hidden_size, ffns, active, sums=True),
        Phase("down, all neurons", c.ffn_size, c.hidden_size, ffns, sums=True),
        Phase("down of the dense twin", c.hidden_size, c.ffn_size, ffns),
        Phase("head", c.vocab_size, c.hidden_size, 1),
    ]


def measure(
    phase: Phase, kind: GGMLQuantizationType, isa: str, threads: int, resident: int
) -> tuple[float, float, float]:
    """(seconds of one product, bytes that it reads, the read limit meanwhile in GB/s).

    `resident`: 0, or the bytes that stay in the cache.
    """
    rng = np.random.default_rng(0)
    raw = random_rows(rng, (phase.rows, phase.cols), kind, Rows(1.0)).reshape(-1)
    copies = 1 if resident else max(1, COLD_BYTES // raw.size)
    matrices = [kernels.Matrix(isa, int(kind), phase.rows, phase.cols, raw) for _ in range(copies)]
    matrices *= RESIDENT_PASSES if resident else 1
    x = kernels.Vectors(isa, rng.standard_normal((1, phase.cols)).astype(np.float32), int8=True)
    listed = np.flatnonzero(rng.random(phase.rows) < phase.share).astype(np.int32)
    pieces = np.array_split(listed, NEURON_BLOCKS if phase.sums else threads)
    share = np.array_split(np.arange(len(pieces)), threads)
    coefficient = np.ones(phase.rows, np.float32)
    y = np.zeros((threads, phase.cols), np.float32)
    bounds = np.linspace(0, phase.rows, threads + 1).astype(int)

    def work(thread: int) -> None:
        for matrix in matrices:
            if phase.sums:
                for piece in share[thread]:
                    rows = pieces[piece]
                    matrix.sum_listed(rows, coefficient[: len(rows)], len(rows), y[thread])
            elif phase.share < 1:
                matrix.dot_listed(pieces[thread], x, 0)
            else:
                matrix.dot(x, int(bounds[thread]), int(bounds[thread + 1]))

    times, limits = [], []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(PASSES):
            limits.append(_native.read_bandwidth(resident or 256 << 20, threads, 20 if resident else 2))
            times.append(timed(lambda: list(pool.map(work, range(threads)))) / len(matrices))
    return statistics.median(times), len(listed) * matrices[0].row_bytes, statistics.median(limits)


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main() -> None:
    """Print a line a phase."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="mistral-7b")
    parser.add_argument("--quant", choices=("q4_0", "q8_0"), default="q4_0")
    parser.add_argument("--gate-rate", type=float, default=0.25)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument(
        "--selected", type=float, default=1.2, help="neurons that a predictor selects, over active ones"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resident", action="store_true", help="the model stays in the last-level cache")
    parser.add_argument("--isa", choices=kernels.available(), default=kernels.available()[0])
    args = parser.parse_args()
    quant = GGMLQuantizationType[args.quant.upper()]
    print(f"{args.shape} {args.quant}, {args.threads} threads, {args.isa}")
    print(f"{'phase':24} {'MB/token':>9} {'ms/token':>9} {'GB/s':>6} {'of the limit':>13}")
    active = 1 - args.sparsity
    phases = phases_of(args.shape, args.gate_rate, active, args.selected * active)
    bits = {GGMLQuantizationType.Q4_0: 4.5, GGMLQuantizationType.Q8_0: 8.5}[quant]
    dense = [phase for phase in phases if phase.share == 1.0 and "twin" not in phase.name]
    resident = round(sum(phase.rows * phase.cols * phase.times * bits / 8 for phase in dense)) if args.resident else 0
    for phase in phases:
        phase = phase.of_all_layers() if args.resident else phase
        kind = GGMLQuantizationType.Q8_0 if phase.name == "head" else quant  # as export stores them
        seconds, read, limit = measure(phase, kind, args.isa, args.threads, resident)
        rate = read / seconds / 1e9
        print(
            f"{phase.name:24} {read * phase.times / 1e6:9.1f} {seconds * phase.times * 1e3:9.2f} {rate:6.1f}"
            f" {rate / limit:6.1%} of {limit:.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
