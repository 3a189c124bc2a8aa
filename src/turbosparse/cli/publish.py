"""`turbosparse publish`: a model card from the run, and the model on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from turbosparse.cli import output
from turbosparse.cli.extras import extra
from turbosparse.cli.options import Json
from turbosparse.errors import UserError
from turbosparse.model.gguf_parts import files_of


def command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A stage that `turbosparse train` wrote.")],
    to: Annotated[
        str | None, typer.Option("--to", metavar="OWNER/NAME", help="Push it there; else only a card.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Create the repository as a private one.")] = False,
    control: Annotated[Path | None, typer.Option("--control", help="The stage folder of the dense control.")] = None,
    scores: Annotated[Path | None, typer.Option("--scores", help="What `turbosparse eval --json` printed.")] = None,
    bench: Annotated[Path | None, typer.Option("--bench", help="What `turbosparse bench --json` printed.")] = None,
    gguf: Annotated[list[Path] | None, typer.Option("--gguf", help="A GGUF file to go along; may be repeated.")] = None,
    licence: Annotated[str | None, typer.Option("--license", help="Default: the one carried over.")] = None,
    base_model: Annotated[str | None, typer.Option("--base-model", help="Hub id of the dense model.")] = None,
    json: Json = False,
) -> None:
    """Describe a trained model by what its run measured, and share it."""
    from turbosparse.model.provenance import README, Provenance, provenance

    with extra("train"):  # a recipe is checked by what trains it
        from turbosparse.publish.card import Evidence, model_card
        from turbosparse.publish.run import read_json, read_run
        from turbosparse.publish.swap import read_swap

    ggufs = gguf or []
    for file in ggufs:
        if not file.is_file():
            raise UserError(f"{file}: no such file; write it with `turbosparse export`.")
    ggufs = list(dict.fromkeys(files_of(file)[0] for file in ggufs))  # of several parts the first stands for all
    carried = provenance(folder)
    origin = Provenance(licence or carried.license, base_model or carried.base_model)
    if to is not None and origin.license is None:
        raise UserError(f"{folder}: nothing says under which licence the model is; name it with --license.")
    evidence = Evidence(
        run=read_run(folder),
        swap=read_swap(folder),
        control=read_run(control) if control else None,
        scores=read_json(scores) if scores else None,
        bench=read_json(bench) if bench else None,
        ggufs=[file.name for file in ggufs],
    )
    card = folder / README
    _write(card, model_card(to or folder.resolve().name, origin, evidence))
    address = None
    if to is not None:
        from turbosparse.publish.upload import upload

        address = upload(folder, ggufs, to, private)
    if json:
        output.emit({"card": str(card), "address": address})
        return
    print(address or card)
    if address is None:
        output.notice("next: read the card, then push it: turbosparse publish ... --to OWNER/NAME")


def _write(card: Path, text: str) -> None:
    from turbosparse.model.export import replacing

    try:
        with replacing(card) as partial:
            partial.write_text(text, encoding="utf-8")
    except UnicodeEncodeError:
        raise UserError(
            f"{card}: a name, an option or a JSON file holds half a surrogate pair, which is no text; correct it."
        ) from None
