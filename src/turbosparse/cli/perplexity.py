"""`turbosparse perplexity`: how well a model predicts a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from turbosparse.cli import options, output
from turbosparse.cli.loading import load_engine, reading_mode
from turbosparse.errors import UserError


def command(
    model: options.AnyModel,
    data: options.Data,
    mode: options.ModeOption = options.Mode.auto,
    limit: Annotated[int | None, typer.Option("--limit", min=2, help="Read at most this many tokens.")] = None,
    threads: options.Threads = None,
    compute: options.ComputeOption = options.Compute.int8,
    isa: options.IsaOption = None,
    json: options.Json = False,
) -> None:
    """Measure perplexity: documents joined by EOS, in windows of 1024 tokens side by side, the tail kept."""
    from turbosparse.evaluate.perplexity import perplexity_engine, perplexity_hf
    from turbosparse.evaluate.windows import engine_windows

    if Path(model).is_dir():
        if mode is not options.Mode.auto:
            raise UserError(f"--mode {mode.value}: modes are the engine's, and {model} is a folder; export it first.")
        with output.progress("reading") as report:
            result = perplexity_hf(model, data, limit=limit, progress=lambda done, _: report(done, limit or 0))
    else:
        engine = load_engine(model, threads, compute, isa)
        pieces = engine_windows(engine, data, limit)
        total = sum(len(piece) - 1 for piece in pieces)
        with output.progress("reading") as report:
            chosen = reading_mode(engine, mode)
            result = perplexity_engine(engine, pieces, chosen, lambda done, _: report(done, total))
    if json:
        output.emit(result.to_json())
    else:
        print(
            f"perplexity {result.perplexity:.3f}   {result.nats_per_token:.4f} nats per token   "
            f"{result.tokens} tokens, mode {result.mode}"
        )
