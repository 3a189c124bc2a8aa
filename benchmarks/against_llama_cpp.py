"""Our engine and llama.cpp on the same dense file, and the modes of a sparse one, interleaved in one run.

    python benchmarks/against_llama_cpp.py DENSE.gguf [--sparse SPARSE.gguf] [--threads 2] [--out results.json]

Needs llama-cpp-python (pip install 'turbosparse[bench]'). llama.cpp reads its prompt token by token (n_batch=1), so
only its decoding is compared.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from turbosparse.bench.compare import Contestant, Sample, compare
from turbosparse.bench.contestants import EngineMode
from turbosparse.bench.machine import busy_share
from turbosparse.cli.bench import machine
from turbosparse.engine import Engine


class LlamaCpp:
    """llama.cpp through llama-cpp-python. It is fed a fixed token, so that no sampling in Python is in its time."""

    mode = "llama.cpp"

    def __init__(self, path: Path, threads: int, context: int) -> None:
        from llama_cpp import Llama

        options = {"n_threads": threads, "n_threads_batch": threads, "n_batch": 1, "verbose": False}
        self._llama = Llama(str(path), n_ctx=context, **options)

    def measure(self, prompt: Sequence[int], decode_tokens: int) -> Sample:
        llama = self._llama
        llama.reset()
        started = time.perf_counter()
        llama.eval(list(prompt))
        read = time.perf_counter()
        for _ in range(decode_tokens):
            llama.eval([prompt[-1]])
        return Sample(len(prompt), read - started, decode_tokens, time.perf_counter() - read)


def main() -> None:
    """Run it; prints one line a contestant and writes the JSON object of the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dense", type=Path)
    parser.add_argument("--sparse", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    busy = busy_share(1.0)
    dense = Engine.load(options.dense, threads=options.threads)
    prompt = dense.tokenizer.encode("The history of mathematics begins with")
    contestants: list[Contestant] = [
        LlamaCpp(options.dense, options.threads, len(prompt) + options.tokens + 8),
        EngineMode(dense, "dense", "dense twin"),
    ]
    if options.sparse:
        sparse = Engine.load(options.sparse, threads=options.threads)
        contestants += [EngineMode(sparse, mode) for mode in sparse.modes]
    runs = compare(contestants, prompt, options.tokens, options.repeats)
    for run in runs:
        print(
            f"{run.mode:12} {run.decode_tok_s:8.1f} tok/s  {run.decode_tok_s / runs[0].decode_tok_s:5.2f} of llama.cpp"
        )
    record = {
        "command": " ".join(["python", "benchmarks/against_llama_cpp.py", *(Path(a).name for a in sys.argv[1:])]),
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "machine": machine(dense.isa, options.threads) | {"busy_before": busy},
        "prompt_tokens": len(prompt),
        "tokens": options.tokens,
        "repeats": options.repeats,
        "runs": [vars(run) for run in runs],
    }
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
