"""Lossless mode: the same tokens as exact mode on many prompts, and its speed, also at another shape.

    python benchmarks/lossless.py MODEL.gguf --data TEXT.jsonl [--data ...] [--temperature 0.8] [--out texts.json]
    python benchmarks/lossless.py SHAPE.gguf --replay texts.json

The first form continues the beginnings of documents, taken from the files in turn, and compares the modes; --out keeps
the texts, and for every token whether a draft of it in predicted mode, up to 4 ahead of what is exact, is right. The
second form times a model with random weights on these texts: its drafts come true where those of the real model did,
and what is drawn is the text. Prints one JSON object; tokens/s of decoding over all prompts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from turbosparse.documents import read_documents
from turbosparse.engine import LOSSLESS, Drafting, Engine, SamplingParams, Session, draw_tokens

CHAIN = 4  # drafts after each other


def prompts(engine: Engine, files: Sequence[str], count: int, tokens: int) -> Iterator[list[int]]:
    """The first tokens of documents that are longer, from the files in turn."""
    long = [
        (ids[:tokens] for text in read_documents(Path(file)) if len(ids := engine.tokenizer.encode(text)) > tokens)
        for file in files
    ]
    return islice((ids for together in zip(*long, strict=False) for ids in together), count)


def decode(session: Session, params: SamplingParams, count: int, mode: str) -> tuple[list[int], float]:
    """(tokens drawn after a prompt, seconds for all but the first)."""
    drawn = draw_tokens(session, params, count, mode)
    tokens = [next(drawn)]
    begun = time.perf_counter()
    tokens += drawn
    return tokens, time.perf_counter() - begun


def agreement(session: Session, prompt: list[int], text: list[int], params: SamplingParams) -> list[bool]:
    """Whether drafts of the tokens of `text` are right, in chains from what exact mode has read."""
    session.reset()
    session.prefill(prompt, "exact")
    right = [True]
    while len(right) < len(text):
        first = len(right) - 1
        for token in text[first : first + CHAIN]:
            session.decode(token, "predicted")
            if len(right) < len(text):
                right.append(session.sample(params) == text[len(right)])
            if not right[-1]:
                break
        session.truncate(len(prompt) + first)
        session.logits(text[first : len(right) - 1], "exact")
    return right


def compare(engine: Engine, args: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Every mode on every prompt: (figures, texts)."""
    modes = [mode for mode in ("exact", "predicted", LOSSLESS) if mode in (*engine.modes, LOSSLESS)]
    seconds, drafting, same, texts = dict.fromkeys(modes, 0.0), Drafting(0, 0, 0, 0, 0, 0), 0, []
    for index, prompt in enumerate(prompts(engine, args.data, args.prompts, args.prompt_tokens)):
        params = SamplingParams(temperature=args.temperature, seed=index)
        written = {}
        for mode in modes:
            session = engine.session(len(prompt) + args.tokens)
            session.prefill(prompt, mode)
            written[mode], taken = decode(session, params, args.tokens, mode)
            seconds[mode] += taken
            if mode == LOSSLESS:
                drafting += session.drafting
        same += written[LOSSLESS] == written["exact"]
        if args.out:
            session = engine.session(len(prompt) + args.tokens + CHAIN)
            agrees = agreement(session, prompt, written["exact"], params) if "predicted" in modes else []
            texts.append({"prompt": prompt, "text": written["exact"], "agrees": agrees})
        print(f"{index + 1}: {same} the same", file=sys.stderr)
    decoded = (args.tokens - 1) * (index + 1)
    speeds = {mode: decoded / taken for mode, taken in seconds.items()}
    return {"prompts": index + 1, "same_as_exact": same, "tok_s": speeds, "lossless": drafting.to_json()}, texts


def replay(engine: Engine, texts: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """Every mode on the recorded texts, the drawing of which is given."""
    seconds = {"exact": 0.0, "predicted": 0.0, LOSSLESS: 0.0}
    drafting, greedy = Drafting(0, 0, 0, 0, 0, 0), SamplingParams()
    for each in texts:
        prompt, text = ([token % engine.config.vocab_size for token in each[name]] for name in ("prompt", "text"))
        text = text[:tokens]
        for mode in seconds:
            session = engine.session(len(prompt) + len(text))
            session.prefill(prompt, "exact")
            session.follow(prompt + text, [True] * len(prompt) + each["agrees"][: len(text)])
            begun = time.perf_counter()
            at = 0
            while at < len(text) - 1:
                if mode == LOSSLESS:
                    at += len(session.decode_ahead(text[at], greedy, len(text) - 1 - at))
                else:
                    session.decode(text[at], mode)
                    session.sample(greedy)
                    at += 1
            seconds[mode] += time.perf_counter() - begun
            if mode == LOSSLESS:
                drafting += session.drafting
    decoded = sum(len(each["text"][:tokens]) - 1 for each in texts)
    speeds = {mode: decoded / taken for mode, taken in seconds.items()}
    return {"texts": len(texts), "tok_s": speeds, "lossless": drafting.to_json()}


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", action="append", default=[])
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--skip", type=int, default=0, help="recorded texts to leave out")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--replay", type=Path)
    args = parser.parse_args()
    engine = Engine.load(args.model)
    if args.replay:
        texts = json.loads(args.replay.read_text())["texts"][args.skip :][: args.prompts]
        figures = replay(engine, texts, args.tokens)
    else:
        figures, texts = compare(engine, args)
        agrees = [right for each in texts for right in each["agrees"][1:]]
        figures["predicted_agreement"] = sum(agrees) / len(agrees) if agrees else None
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    record = {"command": settings, "isa": engine.isa, "threads": engine.threads, **figures}
    if args.out:
        args.out.write_text(json.dumps(record | {"texts": texts}))
    print(json.dumps(record))


if __name__ == "__main__":
    main()
