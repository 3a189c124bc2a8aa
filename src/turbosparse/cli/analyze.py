"""`turbosparse analyze`: where a model is sparse."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from turbosparse.cli import options, output
from turbosparse.cli.loading import load_engine


def command(
    model: options.AnyModel,
    data: options.Data,
    limit: Annotated[int | None, typer.Option("--limit", min=2, help="Read at most this many tokens.")] = None,
    threads: options.Threads = None,
    compute: options.ComputeOption = options.Compute.int8,
    isa: options.IsaOption = None,
    json: options.Json = False,
) -> None:
    """Show how sparse a model is on a text, per layer."""
    from turbosparse.analyze.capture import capture_engine, capture_hf

    with output.progress("reading") as report:
        if Path(model).is_dir():
            result = capture_hf(Path(model), data, limit, lambda done: report(done, limit or 0))
        else:
            from turbosparse.evaluate.windows import windows

            engine = load_engine(model, threads, compute, isa)
            pieces = list(windows(engine.tokenizer, data, limit=limit))
            total = sum(map(len, pieces))
            result = capture_engine(engine, pieces, lambda done: report(done, total))
    if json:
        output.emit(result.to_json())
        return
    from turbosparse.analyze.report import chart

    output.stdout_console().print(chart(result))
