"""A sparsity report as a chart in the terminal: one bar a layer, or an expert of a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbosparse.analyze.statistics import LayerSparsity, SparsityReport

if TYPE_CHECKING:
    from rich.table import Table

_BAR = 20
_NAMED = 3  # neurons
_EIGHTHS = " ▏▎▍▌▋▊▉"


def bar(share: float, width: int = _BAR) -> str:
    """A bar of `width` characters, `share` of it filled, to an eighth of a character."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(width)


def chart(report: SparsityReport) -> Table:
    """The layers as a table with bars of active neurons, and the figures beside them."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=f"Active neurons per layer, over {report.tokens:,} tokens", pad_edge=False)
    experts = ("expert", "tokens") if any(layer.expert is not None for layer in report.layers) else ()
    for name in ("layer", *experts):
        table.add_column(name, justify="right")
    for name, justify in (("active neurons", "left"), ("silent", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name in ("gate ≤ 0", "up ≤ 0", "hot", "cold", "never"):
        table.add_column(name, justify="right")
    predictor = report.predictor
    for name in ("selected", "recall", "|h| missed", "missed most") if predictor else ():
        table.add_column(name, justify="right")
    for layer in report.layers:
        table.add_row(*_cells(layer))
    table.add_section()
    table.add_row(
        "mean",
        *("" for _ in experts),
        _coloured_bar(1 - report.mean("h")),
        f"[bold]{report.mean('h'):.1%}[/]",
        f"{report.mean('gate'):.1%}",
        f"{report.mean('up'):.1%}",
        *(("", "", "", *(f"{share:.1%}" for share in predictor.values()), "") if predictor else ()),
    )
    return table


def _cells(layer: LayerSparsity) -> tuple[str, ...]:
    shares = (f"{layer.h:.1%}", f"{layer.gate:.1%}", f"{layer.up:.1%}")
    prediction = [f"{share:.1%}" for share in (layer.selected, layer.recall, layer.missed) if share is not None]
    if layer.most_missed:
        prediction.append(" ".join(str(one.neuron) for one in layer.most_missed[:_NAMED]))
    rest = (str(layer.hot), str(layer.cold), str(layer.never), *prediction)
    expert = () if layer.expert is None or layer.routed is None else (str(layer.expert), f"{layer.routed:.1%}")
    return (str(layer.layer), *expert, _coloured_bar(1 - layer.h), *shares, *rest)


def _coloured_bar(share: float) -> str:
    filled = bar(share)
    return f"[green]{filled.rstrip()}[/][dim]{'·' * (len(filled) - len(filled.rstrip()))}[/]"
