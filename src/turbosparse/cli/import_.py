"""`turbosparse import`: a model that PowerInfer's authors published, as a file of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from turbosparse.cli import output
from turbosparse.cli.export import Quant, show
from turbosparse.cli.options import Json


def command(
    source: Annotated[
        Path, typer.Argument(metavar="FILE_OR_FOLDER", help="A PowerInfer file, or a sparse Hugging Face folder.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="The file to write.")],
    quant: Annotated[
        Quant | None, typer.Option("--quant", help="Storage of the matrices of a folder.", show_default="q4_0")
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option("--threshold", min=-1e6, max=1e6, help="Of the predictors' scores.", show_default="as stated"),
    ] = None,
    json: Json = False,
) -> None:
    """Write a model of PowerInfer as one file of ours, predictors included."""
    from turbosparse.model.import_powerinfer import import_model

    with output.progress(f"writing {out.name}") as report:
        done = import_model(source, out, None if quant is None else quant.value, threshold, report)
    show(done, json, f"run it: turbosparse run {done.path} -p 'Once upon a time'")
