"""Speed of each native kernel, by weight type and instruction set: GB/s of weights read, GMAC/s for prefill.

    python benchmarks/kernel_speed.py [--rows 1536] [--cols 576] [--threads 1] [--types q4_0 q8_0] [--resident]

Matrices together exceed the last-level cache's share (512 MiB) unless --resident asks for one that stays in the cache.
A figure is the best of a few passes; with several threads each one has matrices of its own.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import gguf
import numpy as np

from turbosparse._native import kernels

TYPES = {"f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q4_0": 2}
COLD_BYTES = 512 * 2**20
PASSES = 5
BLOCK_ROWS = 896  # neurons of a block of a 7B, which sums over rows go over


def matrices(isa: str, kind: str, rows: int, cols: int, total_bytes: int) -> list[kernels.Matrix]:
    """Copies of one random matrix, `total_bytes` in all."""
    weights = np.random.default_rng(0).standard_normal((rows, cols)).astype(np.float32)
    data = (
        np.ascontiguousarray(gguf.quantize(weights, gguf.GGMLQuantizationType(TYPES[kind]))).view(np.uint8).reshape(-1)
    )
    return [kernels.Matrix(isa, TYPES[kind], rows, cols, data) for _ in range(max(1, total_bytes // data.size))]


def seconds(work: Callable[[int], None], threads: int) -> float:
    """Best time of one pass of work(thread) on all threads at once."""
    with ThreadPoolExecutor(threads) as pool:
        times = []
        for _ in range(PASSES):
            start = time.perf_counter()
            list(pool.map(work, range(threads)))
            times.append(time.perf_counter() - start)
    return min(times)


def measure(isa: str, kind: str, args: argparse.Namespace) -> dict[str, float]:
    """GB/s per kernel, and GMAC/s of 128 vectors at once."""
    rows, cols = args.rows, args.cols
    size = 0 if args.resident else COLD_BYTES // args.threads
    own = [matrices(isa, kind, rows, cols, size) for _ in range(args.threads)]
    repeats = max(1, (64 * 2**20) // (own[0][0].row_bytes * rows)) if args.resident else 1
    rng = np.random.default_rng(1)
    int8 = kind in ("q4_0", "q8_0")
    one = kernels.Vectors(isa, rng.standard_normal((1, cols)).astype(np.float32), int8)
    many = kernels.Vectors(isa, rng.standard_normal((128, cols)).astype(np.float32), int8)
    tenth = np.sort(rng.choice(rows, max(1, rows // 10), replace=False)).astype(np.int32)
    every = np.arange(rows, dtype=np.int32)
    coefficient = np.ones(rows, np.float32)
    y = np.zeros((args.threads, cols), np.float32)

    def each(call: Callable[[kernels.Matrix, int], object]) -> Callable[[int], None]:
        def work(thread: int) -> None:
            for _ in range(repeats):
                for matrix in own[thread]:
                    call(matrix, thread)

        return work

    def bandwidth(call: Callable[[kernels.Matrix, int], object], read_rows: int) -> float:
        count = sum(len(each_own) for each_own in own) * repeats
        return own[0][0].row_bytes * read_rows * count / seconds(each(call), args.threads) / 1e9

    def many_sums(thread: int) -> None:
        own[thread][0].sum_rows(0, block, coefficients)

    block = min(rows, BLOCK_ROWS)
    coefficients = rng.standard_normal((64, block), dtype=np.float32)
    sums = {}
    if int8:
        sums = {
            "sum_listed": bandwidth(
                lambda m, t: m.sum_listed(tenth, coefficient[: tenth.size], rows, y[t]), tenth.size
            ),
            "sum_rows": block * cols * 64 * args.threads / seconds(many_sums, args.threads) / 1e9,
        }
    prefill = seconds(lambda thread: [own[thread][0].dot(many, 0, rows), None][1], args.threads)
    return {
        "dot": bandwidth(lambda m, _: m.dot(one, 0, rows), rows),
        "dot_listed": bandwidth(lambda m, _: m.dot_listed(tenth, one, 0), tenth.size),
        "axpy": bandwidth(lambda m, t: m.axpy_listed(every, coefficient, y[t]), rows),
        "axpy_listed": bandwidth(lambda m, t: m.axpy_listed(tenth, coefficient[: tenth.size], y[t]), tenth.size),
        "prefill": rows * cols * 128 * args.threads / prefill / 1e9,
        **sums,
    }


def main() -> None:
    """Print one line a kernel table and weight type."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1536)
    parser.add_argument("--cols", type=int, default=576)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--isa", nargs="+", default=kernels.available())
    parser.add_argument("--resident", action="store_true", help="one matrix, which stays in the cache")
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {args.threads} threads, {args.rows} x {args.cols}")
    print("GB/s of weights (10 % of the rows where listed); prefill, sum_rows: GMAC/s of 128 and 64 vectors")
    for isa in args.isa:
        for kind in args.types:
            figures = measure(isa, kind, args)
            print(f"{isa:8} {kind:5}", "  ".join(f"{name} {value:7.2f}" for name, value in figures.items()), flush=True)


if __name__ == "__main__":
    main()
