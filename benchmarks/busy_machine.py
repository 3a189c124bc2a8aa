"""What a loaded engine costs while it is idle, and how it and llama.cpp decode beside a process that keeps a core busy.

    python benchmarks/busy_machine.py MODEL.gguf DENSE_TWIN.gguf [--rounds 3] [--tokens 200] [--idle-seconds 5]

Both decode in exact turns, alone and beside `while True: pass`; prints one JSON object with tokens/s.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable

from llama_cpp import Llama

from turbosparse.engine import Engine

PROMPT = list(range(5, 37))


def ours(engine: Engine, tokens: int) -> float:
    """Tokens/s of exact mode."""
    session = engine.session()
    session.prefill(PROMPT, "exact")
    return speed(lambda: session.decode(7, "exact"), tokens)


def theirs(model: Llama, tokens: int) -> float:
    """Tokens/s of llama.cpp."""
    model.reset()
    model.eval(PROMPT)
    return speed(lambda: model.eval([7]), tokens)


def speed(step: Callable[[], object], tokens: int) -> float:
    for _ in range(16):
        step()
    started = time.perf_counter()
    for _ in range(tokens):
        step()
    return tokens / (time.perf_counter() - started)


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("twin")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--idle-seconds", type=float, default=5)
    args = parser.parse_args()
    engine = Engine.load(args.model)
    ours(engine, args.tokens)
    time.sleep(0.3)
    before = time.process_time()
    time.sleep(args.idle_seconds)
    idle = time.process_time() - before
    peer = Llama(args.twin, n_ctx=1024, n_threads=engine.threads, n_threads_batch=engine.threads, verbose=False)
    speeds: dict[str, dict[str, list[float]]] = {place: {"exact": [], "llama.cpp": []} for place in ("alone", "beside")}
    for _ in range(args.rounds):
        for place, figures in speeds.items():
            busy = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if place == "beside" else None
            time.sleep(0.3)
            figures["exact"].append(ours(engine, args.tokens))
            figures["llama.cpp"].append(theirs(peer, args.tokens // 3))
            if busy is not None:
                busy.kill()
                busy.wait()
    print(json.dumps({"idle_cpu_seconds": idle, "idle_seconds": args.idle_seconds, **speeds}))


if __name__ == "__main__":
    main()
