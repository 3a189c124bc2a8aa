"""`turbosparse train-predictors`: predictors for the engine's predicted mode."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from turbosparse.cli import options, output
from turbosparse.cli.extras import extra
from turbosparse.model.gguf_parts import whole_name

if TYPE_CHECKING:
    from rich.table import Table

    from turbosparse.predict import Report


class Device(StrEnum):
    """What torch computes on."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def command(
    model: options.AnyModel,
    data: options.Data,
    share: Annotated[float, typer.Option("--share", help="Bytes of the predictors over those of the FFNs.")] = 0.10,
    rank: Annotated[int | None, typer.Option("--rank", help="The same width everywhere, instead of --share.")] = None,
    recall: Annotated[float, typer.Option("--recall", help="Share of the |h| mass to keep, mean of layers.")] = 0.98,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Read at most this many tokens.")] = 100_000,
    epochs: Annotated[float, typer.Option("--epochs", min=0.1, help="How often each layer sees them.")] = 15.0,
    device: Annotated[Device, typer.Option("--device", help="Where to compute; auto: on a GPU if there is one.")] = (
        Device.auto
    ),
    out: Annotated[
        Path | None, typer.Option("--out", metavar="OUT.gguf", help="Default: MODEL-predictors.gguf, here.")
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the model's predictors, set their thresholds anew.")
    ] = False,
    together: Annotated[
        bool, typer.Option("--together", help="Hold the model in memory and fit all layers at once; for GPUs.")
    ] = False,
    end_to_end: Annotated[
        int,
        typer.Option(
            "--end-to-end", min=0, metavar="STEPS", help="Then train all on the model's own output (as --together)."
        ),
    ] = 0,
    gates: Annotated[
        bool | None,
        typer.Option(
            "--gates/--no-gates",
            help="The gates themselves predict, only thresholds are set.",
            show_default="if ternary",
        ),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Drop the predictors that the model has.")] = False,
    json: options.Json = False,
) -> None:
    """Learn which neurons of a sparse model will fire, for run --mode predicted. Goes on where it was stopped."""
    with extra("train"):
        from turbosparse.predict import Wish, train_predictors

    out = out or Path(f"{whole_name(Path(model).name).removesuffix('.gguf')}-predictors.gguf")
    wish = Wish(share, rank, recall, tokens, epochs, device.value, keep, together, end_to_end, gates)
    with output.progress("training predictors") as report:
        result = train_predictors(model, data, out, wish, replace, report)
    if json:
        output.emit(result.to_json())
        return
    output.stdout_console().print(_table(result))
    if all(layer.rank == 0 for layer in result.layers):
        output.notice("the gates themselves predict, only thresholds were set; --no-gates trains networks instead")
    output.notice(f"written; now: turbosparse run {out} --mode predicted -p 'Once upon a time'")


def _table(result: Report) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=f"Predictors on held-out text, of {result.tokens:,} tokens")
    for name in ("layer", "rank", "bytes", "active", "|h| kept", "found", "selected / active", "millinats lost"):
        table.add_column(name, justify="right")
    for layer in result.layers:
        table.add_row(str(layer.layer), *_cells(vars(layer)))
    table.add_section()
    table.add_row("mean", *_cells(result.to_json()["mean"]))
    return table


def _cells(row: dict[str, float]) -> tuple[str, ...]:
    shares = (output.percent(row[name]) for name in ("bytes_share", "active", "mass_kept", "recall"))
    return (f"{row['rank']:g}", *shares, f"{row['selected']:.2f}", f"{1000 * row['nats_lost']:.2f}")
