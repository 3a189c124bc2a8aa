"""`turbosparse run`: continue a text."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from turbosparse.cli import modes, options, output
from turbosparse.cli.loading import load_engine
from turbosparse.errors import UserError

if TYPE_CHECKING:
    from turbosparse.engine import Chunk, Engine


def command(
    model: options.Model,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The text to continue; default: stdin.")] = None,
    tokens: options.MaxTokens = 128,
    mode: options.ModeOption = options.Mode.auto,
    audit: options.Audit = options.AUDIT,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = 0,
    stop: options.Stop = None,
    ignore_eos: options.IgnoreEos = False,
    threads: options.Threads = None,
    ctx: options.ContextLength = None,
    kv_cache: options.KvCacheOption = None,
    compute: options.ComputeOption = options.Compute.int8,
    isa: options.IsaOption = None,
    json: options.Json = False,
) -> None:
    """Continue a text. The continuation goes to stdout, everything else to stderr."""
    from turbosparse.engine import SamplingParams, generate

    text = read_prompt(prompt)
    params = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    engine = load_engine(model, threads, compute, isa)
    ids = engine.tokenizer.encode(text)
    session = engine.session(ctx, kv_cache)
    modes.begin(session, mode, audit, seed)
    started = time.perf_counter()
    chunks = generate(engine, ids, params, tokens, mode.value, stop or (), ignore_eos, session)
    prefill_seconds = time.perf_counter() - started
    clock = Clock(prompt_tokens=len(ids), prefill_seconds=prefill_seconds)
    shown = []
    for chunk in clock.watch(chunks):
        shown.append(chunk.text)
        if not json:
            print(chunk.text, end="", flush=True)
    record = clock.record(engine, session.used(mode.value)) | {"kv_cache_bytes": session.cache_bytes}
    record |= modes.record(session, mode)
    if json:
        output.emit(record | {"text": "".join(shown)})
    else:
        print()
        for line in (status_line(record), *modes.lines(record)):
            output.notice(line)


def read_prompt(prompt: str | None) -> str:
    """The prompt of the command line, or stdin to its end.

    Raises:
        UserError: stdin is a terminal, or not UTF-8, or there is no text.
    """
    if prompt is None:
        if sys.stdin.isatty():
            raise UserError("there is no prompt; give one with -p TEXT, or pipe it in.")
        try:
            prompt = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError:
            raise UserError("stdin is not UTF-8 text; convert it first.") from None
    if not prompt:
        raise UserError("the prompt is empty; give it some text.")
    return prompt


class Clock:
    """Times a generation. Decoding is timed from the first token to the last: the tokens between, by their time."""

    def __init__(self, prompt_tokens: int, prefill_seconds: float) -> None:
        self.prompt_tokens, self.prefill_seconds = prompt_tokens, prefill_seconds
        self.tokens = 0
        self._first = self._last = 0.0

    def watch(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        """Pass the chunks on, looking at the clock."""
        for chunk in chunks:
            self._last = time.perf_counter()
            self._first = self._first or self._last
            self.tokens += 1
            yield chunk

    def record(self, engine: Engine, mode: str) -> dict[str, Any]:
        """The figures of the `run` object; speeds in tokens/s, null where nothing was decoded."""
        decoded = self._last - self._first
        traffic = engine.traffic()
        return {
            "mode": mode,
            "prompt_tokens": self.prompt_tokens,
            "tokens": self.tokens,
            "prefill_tok_s": self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else None,
            "decode_tok_s": (self.tokens - 1) / decoded if self.tokens > 1 and decoded else None,
            "sparsity": traffic.sparsity,
            "selected": traffic.selected,
        }


def status_line(record: dict[str, Any]) -> str:
    """One line about a generation."""
    parts = [
        f"[{record['mode']}]",
        f"prompt {record['prompt_tokens']} tokens, {output.number(record['prefill_tok_s'])} tok/s;",
        f"answer {record['tokens']} tokens, {output.number(record['decode_tok_s'])} tok/s",
    ]
    if record["sparsity"] is not None:
        parts.append(f"with {output.percent(record['sparsity'])} of the neurons silent")
    if record["selected"] is not None:
        parts.append(f"and {output.percent(record['selected'])} selected")
    return " ".join(parts)
