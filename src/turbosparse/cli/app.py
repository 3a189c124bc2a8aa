"""All stages under one program, and the one place where a user's mistake becomes a sentence and exit code 2."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import turbosparse
from turbosparse.cli import (
    analyze,
    bench,
    chat,
    convert,
    demo,
    eval,
    export,
    import_,
    info,
    output,
    perplexity,
    publish,
    run,
    synth,
    train,
    train_predictors,
)
from turbosparse.errors import UserError


class _Stages(TyperGroup):
    """The group of all stages, in the order of the pipeline."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)  # typer sorts by registration already; click alone would sort by name

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            sentence = str(error)
        except MemoryError:
            sentence = "there is not enough memory for this; use a smaller model, file or --ctx."
        except OSError as error:
            if isinstance(error, BrokenPipeError) or error.strerror is None:
                raise  # click ends quietly when the reader of a pipe has gone; an error without a cause is a bug
            place = f"{error.filename}: " if error.filename is not None else ""
            sentence = f"{place}{error.strerror}; check the path, its permissions and the space left."
        print(f"turbosparse: {output.printable(sentence)}", file=sys.stderr)
        raise typer.Exit(2)


app = typer.Typer(
    cls=_Stages,
    help="Make a language model compute only the neurons that fire.",
    epilog="Start with: turbosparse run MODEL.gguf -p 'Once upon a time'",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a traceback is for a bug report: plain and complete
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"turbosparse {turbosparse.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Make a language model compute only the neurons that fire."""


for stage in (
    convert,
    train,
    train_predictors,
    analyze,
    export,
    import_,
    info,
    run,
    chat,
    perplexity,
    eval,
    bench,
    synth,
    publish,
):
    app.command(stage.__name__.rpartition(".")[2].strip("_").replace("_", "-"))(stage.command)
app.command("demo", hidden=True)(demo.command)
