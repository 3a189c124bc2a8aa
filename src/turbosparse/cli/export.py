"""`turbosparse export`: one file that the engine runs, or PowerInfer."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from turbosparse.cli import output
from turbosparse.cli.extras import extra
from turbosparse.cli.options import Json
from turbosparse.errors import UserError

if TYPE_CHECKING:
    from turbosparse.model.export import ExportReport


class Quant(StrEnum):
    """Storage of the matrices; the embedding is Q8_0 in the quantised ones."""

    q4_0 = "q4_0"
    q8_0 = "q8_0"
    f16 = "f16"


class Format(StrEnum):
    """gguf: ours, and llama.cpp's for dense models; powerinfer: that of PowerInfer's own program."""

    gguf = "gguf"
    powerinfer = "powerinfer"


def command(
    source: Annotated[
        Path, typer.Argument(metavar="HF_DIR", help="A Hugging Face folder; for powerinfer a sparse one or its file.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="The file to write.")],
    quant: Annotated[
        Quant | None, typer.Option("--quant", help="Storage of the matrices of a folder.", show_default="q4_0")
    ] = None,
    format: Annotated[Format, typer.Option("--format", help="Which program it is for.")] = Format.gguf,
    json: Json = False,
) -> None:
    """Write a Hugging Face folder as one GGUF file: weights, tokenizer, chat template, predictors if it has some."""
    if quant is not None and format is Format.powerinfer and not source.is_dir():
        raise UserError(f"--quant {quant}: the weights of {source} stay as they are stored; leave the option out.")
    chosen = (quant or Quant.q4_0).value
    with output.progress(f"writing {out.name}") as report:
        done = _write(source, out, chosen, format, report)
    hint = f"run it: turbosparse run {done.path} -p 'Once upon a time'"
    show(done, json, hint if format is Format.gguf else "PowerInfer runs it, and so does turbosparse run")


def _write(source: Path, out: Path, quant: str, format: Format, report: output.Progress) -> ExportReport:
    from turbosparse.model.export import export_gguf
    from turbosparse.model.export_powerinfer import export_powerinfer

    if format is Format.powerinfer:
        return export_powerinfer(source, out, quant, report)
    if not (source / "predictors.safetensors").is_file():
        return export_gguf(source, out, quant, report)
    with extra("train"):
        from turbosparse.predict.folder import export_with_predictors
    return export_with_predictors(source, out, quant, report)


def show(done: ExportReport, json: bool, hint: str) -> None:
    """What was written: its path, or the JSON object."""
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
        output.notice(f"{output.megabytes(done.file_bytes)}; {hint}")
