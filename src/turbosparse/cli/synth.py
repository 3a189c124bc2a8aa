"""`turbosparse synth`: a model of a well-known shape with random weights, as sparse as asked, to time."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from turbosparse.cli import options, output
from turbosparse.cli.export import Quant
from turbosparse.cli.info import describe

if TYPE_CHECKING:
    from turbosparse.model.synthetic import Rates


class SyntheticActivation(StrEnum):
    """drelu, or swiglu for the dense twin."""

    drelu = "drelu"
    swiglu = "swiglu"


def command(
    out: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="The file to write.")],
    shape: Annotated[str, typer.Option("--shape", help="Such as mistral-7b, llama-3-8b, smollm2-135m.")],
    sparsity: Annotated[
        float | None, typer.Option("--sparsity", help="Share of zeros in h. Default: 0.9, or as --mirrored-ups says.")
    ] = None,
    gate_rate: Annotated[
        float | None,
        typer.Option("--gate-rate", help="Share of positive gates. Default: 0.25, or as --mirrored-ups says."),
    ] = None,
    selected: Annotated[
        float, typer.Option("--selected", help="Neurons that the predictors select, over those that fire.")
    ] = 1.2,
    predictor_share: Annotated[
        float, typer.Option("--predictor-share", help="Bytes of the predictors over those of the FFNs; 0: none.")
    ] = 0.06,
    ternary_gates: Annotated[
        bool, typer.Option("--ternary-gates", help="Gates of three values a row; with --predictor-share 0.")
    ] = False,
    neurons_per_gate: Annotated[int, typer.Option("--neurons-per-gate", help="Neurons that share a gate.")] = 1,
    mirrored_ups: Annotated[
        bool,
        typer.Option(
            "--mirrored-ups",
            help="Two of these share an up, with opposite signs: of those with an open gate, half fire.",
        ),
    ] = False,
    activation: Annotated[
        SyntheticActivation, typer.Option("--activation", help="swiglu: the dense twin, in llama.cpp's layout.")
    ] = SyntheticActivation.drelu,
    layers: Annotated[int | None, typer.Option("--layers", min=1, max=1024, help="Default: the model's own.")] = None,
    quant: Annotated[Quant, typer.Option("--quant", help="Storage of the matrices.")] = Quant.q4_0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the weights.")] = 0,
    json: options.Json = False,
) -> None:
    """Write a model with random weights: its speed is that of a trained one, its text is noise."""
    from turbosparse.model.shapes import shape_config
    from turbosparse.model.synthetic import measure_rates, rates_for, write_synthetic
    from turbosparse.model.synthetic_predictor import Prediction

    config = shape_config(shape, activation.value, layers, neurons_per_gate, mirrored_ups)
    rates = rates_for(sparsity, gate_rate, mirrored_ups)
    prediction = Prediction(selected, predictor_share) if config.sparse and predictor_share != 0 else None
    with output.progress(f"writing {out.name}") as report:
        file_bytes = write_synthetic(
            out, shape, config, rates, quant.value, seed, report, prediction, ternary_gates=ternary_gates
        )
    measured = measure_rates(out)
    predictor = describe(str(out))["predictor"]
    record = {
        "output": str(out),
        "shape": shape,
        "activation": activation.value,
        "layers": config.n_layers,
        "quant": quant.value,
        "ternary_gates": ternary_gates,
        "neurons_per_gate": neurons_per_gate,
        "mirrored_ups": mirrored_ups,
        "file_bytes": file_bytes,
        "measured": {
            "gate_rate": measured.gate,
            "up_rate": measured.up,
            "sparsity": 1.0 - measured.h,
            "selected": measured.selected,
            "recall": measured.recall,
            "predictor_share": predictor and predictor["share"],
        },
    }
    if json:
        output.emit(record)
        return
    print(out)
    _report(file_bytes, measured if config.sparse else None, predictor)
    output.notice(f"time it: turbosparse bench {out}")


def _report(file_bytes: int, measured: Rates | None, predictor: dict[str, Any] | None) -> None:
    """On the terminal: what was written, and how sparse a sparse model came out."""
    if measured:
        output.notice(
            f"synthetic, {output.megabytes(file_bytes)}; measured in its first and last layer: gate positive in "
            f"{output.percent(measured.gate)}, h zero in {output.percent(1.0 - measured.h)}"
        )
    if measured and predictor:
        output.notice(
            f"predictors: {output.percent(predictor['share'])} of the FFN's bytes, select "
            f"{measured.selected:.2f} times as many neurons as fire and find {output.percent(measured.recall)} of these"
        )
