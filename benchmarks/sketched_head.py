"""What a draw gains from the sketch of the head: the same tokens with it and with all logits, in turn.

    python benchmarks/sketched_head.py MODEL.gguf OUT.json [--texts examples/sample.jsonl] [--tokens 256] [--threads 2]

Each text begins a session, which goes on for so many tokens, sixteen by `Session.draw` and sixteen by `decode` and
`sample`; both give the same tokens. Printed for every mode and temperature: the medians of a token's time, their ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path

from turbosparse.bench.machine import cpu_name
from turbosparse.engine import Engine, SamplingParams

_TURN, _SKETCH_IS_MADE = 16, 8


def _turns(engine: Engine, text: str, tokens: int, mode: str, params: SamplingParams) -> dict[str, list[float]]:
    """Seconds a token of every turn, with the sketch and with all logits."""
    session = engine.session()
    session.prefill(engine.tokenizer.encode(text)[:64], mode)
    token = session.sample(params)
    seconds: dict[str, list[float]] = {"sketch": [], "whole": []}
    for _ in range(tokens // (2 * _TURN)):
        for way, times in seconds.items():
            begun = time.perf_counter()
            for _ in range(_TURN):
                if way == "sketch":
                    token = session.draw(token, params, mode)
                else:
                    session.decode(token, mode)
                    token = session.sample(params)
            times.append((time.perf_counter() - begun) / _TURN)
    return seconds


def _compare(engine: Engine, texts: list[str], tokens: int, mode: str, temperature: float) -> dict[str, object]:
    seconds: dict[str, list[float]] = {"sketch": [], "whole": []}
    for seed, text in enumerate(texts):
        turns = _turns(engine, text, tokens, mode, SamplingParams(temperature=temperature, seed=seed))
        for way, times in turns.items():
            seconds[way] += times
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    return {
        "mode": mode,
        "temperature": temperature,
        "ms_with_sketch": 1e3 * medians["sketch"],
        "ms_with_all_logits": 1e3 * medians["whole"],
        "ratio": medians["whole"] / medians["sketch"],
        "turns": len(seconds["sketch"]),
    }


def main() -> None:
    """Compare both ways in dense and exact mode, greedy and at 0.8."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--texts", type=Path, default=Path("examples/sample.jsonl"))
    parser.add_argument("--tokens", type=int, default=256, help="of each text")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    engine = Engine.load(options.model, threads=options.threads)
    texts = [json.loads(line)["text"] for line in options.texts.read_text().splitlines()[:6]]
    _turns(engine, texts[0], 2 * (_TURN + _SKETCH_IS_MADE), "dense", SamplingParams())  # makes the sketch
    rows = []
    for mode in ("dense", "exact") if "exact" in engine.modes else ("dense",):
        for temperature in (0.0, 0.8):
            rows.append(_compare(engine, texts, options.tokens, mode, temperature))
            print(rows[-1], flush=True)
    made = {"command": "python benchmarks/sketched_head.py MODEL OUT", "date": f"{datetime.now(UTC):%Y-%m-%d}"}
    made |= {"cpu": cpu_name(), "isa": engine.isa, "threads": str(options.threads), "model": options.model.name}
    options.out.write_text(json.dumps(made | {"runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
