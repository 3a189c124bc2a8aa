"""`turbosparse train`: recovery training from a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from turbosparse.cli import output
from turbosparse.cli.extras import extra
from turbosparse.cli.options import Json


def command(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="What to train, on what, for how long.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last complete checkpoint.")] = False,
    max_seconds: Annotated[
        float | None,
        typer.Option("--max-seconds", min=0, help="Stop after this long, with a checkpoint to go on from."),
    ] = None,
    json: Json = False,
) -> None:
    """Train a converted model back to full quality, as a recipe says."""
    with extra("train"):
        from turbosparse.relufy.recipes import load_recipe

        load_recipe(recipe)  # what is wrong with it is said before torch is loaded, which takes seconds

        from turbosparse.relufy.processes import this_process
        from turbosparse.relufy.trainer import train_from_recipe

    result = train_from_recipe(recipe, resume, max_seconds)
    if not this_process().is_main_process:
        return
    if json:
        output.emit(result)
    else:
        for key, value in result.items():
            print(f"{key}: {value}")
    if not result["done"]:
        output.notice(f"next: turbosparse train {recipe} --resume")
