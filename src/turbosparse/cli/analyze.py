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
    from turbosparse.analyze import analyze

    source = model if Path(model).is_dir() else load_engine(model, threads, compute, isa)
    with output.progress("reading") as report:
        result = analyze(source, data, limit, report)
    if json:
        output.emit(result.to_json())
        return
    from turbosparse.analyze.report import chart

    output.stdout_console().print(chart(result))
