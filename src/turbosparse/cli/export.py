"""`turbosparse export`: one GGUF file that the engine runs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from turbosparse.cli import output
from turbosparse.cli.extras import extra
from turbosparse.cli.options import Json


class Quant(StrEnum):
    """Storage of the matrices; the embedding is Q8_0 in the quantised ones."""

    q4_0 = "q4_0"
    q8_0 = "q8_0"
    f16 = "f16"


def command(
    folder: Annotated[Path, typer.Argument(metavar="HF_DIR", help="A Hugging Face folder, sparse or dense.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="The file to write.")],
    quant: Annotated[Quant, typer.Option("--quant", help="Storage of the matrices.")] = Quant.q4_0,
    json: Json = False,
) -> None:
    """Write a Hugging Face folder as one GGUF file: weights, tokenizer, chat template, predictors if it has some."""
    from turbosparse.model.export import export_gguf

    with output.progress(f"writing {out.name}") as report:
        done = export_gguf(folder, out, quant.value, report)
    if (folder / "predictors.safetensors").is_file():
        with extra("train"):
            from turbosparse.predict.folder import attach
        attach(folder, out)
    if json:
        output.emit(
            {
                "output": str(done.path),
                "architecture": done.architecture,
                "quant": done.quant,
                "parameters": done.parameters,
                "file_bytes": done.file_bytes,
            }
        )
    else:
        print(done.path)
        output.notice(f"{output.megabytes(done.file_bytes)}; run it: turbosparse run {done.path} -p 'Once upon a time'")
