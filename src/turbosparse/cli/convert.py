"""`turbosparse convert`: swap the activation of every FFN."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from turbosparse.cli import output
from turbosparse.cli.extras import extra
from turbosparse.cli.options import Json


class Activation(StrEnum):
    """What the FFNs of the new model compute; `keep` rewrites the checkpoint (for a control, or to train it on)."""

    drelu = "drelu"
    reglu = "reglu"
    keep = "keep"


def command(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A Hugging Face folder, a hub id or a GGUF file.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The Hugging Face folder to write.")],
    activation: Annotated[
        Activation, typer.Option("--activation", help="The activation to swap in.")
    ] = Activation.drelu,
    json: Json = False,
) -> None:
    """Swap the activation: a dense model in, a Hugging Face folder with dReLU out."""
    with extra("train"):
        from turbosparse.relufy.source import check_source

        check_source(source, out, keep=activation is Activation.keep)  # said before torch is loaded: that takes seconds

        from turbosparse.relufy.convert import convert

    record = convert(source, out, activation.value)
    if json:
        output.emit(record)
    else:
        print(out)
        output.notice(
            "next: train it back to quality (turbosparse train RECIPE.yaml), or look at it (turbosparse analyze)"
        )
