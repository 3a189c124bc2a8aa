"""`turbosparse info`: what a model file is, without running it."""

from __future__ import annotations

from typing import Any

from turbosparse.cli import output
from turbosparse.cli.options import Json, Model


def command(model: Model, json: Json = False) -> None:
    """Show what a model file is."""
    from turbosparse.model.resolve import resolve_gguf

    record = describe(str(resolve_gguf(model)))
    if json:
        output.emit(record)
        return
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for key, value in record.items():
        shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        table.add_row(key.replace("_", " "), "-" if value is None else shown)
    output.stdout_console().print(table)


def describe(path: str) -> dict[str, Any]:
    """The JSON object of `info`. `quant` is the type that holds most of the weights."""
    from collections import Counter

    from turbosparse.model.config import ModelConfig
    from turbosparse.model.gguf import GGUFFile

    with GGUFFile.open(path) as file:
        config = ModelConfig.from_gguf(file)
        weights: Counter[str] = Counter()
        for tensor in file.tensors.values():
            weights[tensor.type.name.lower()] += tensor.size
        return {
            "architecture": file.metadata["general.architecture"],
            "family": config.family,
            "name": file.metadata.get("general.name"),
            "activation": config.activation,
            "layers": config.n_layers,
            "hidden_size": config.hidden_size,
            "ffn_size": config.ffn_size,
            "heads": config.n_heads,
            "kv_heads": config.n_kv_heads,
            "vocab_size": config.vocab_size,
            "context_length": config.context_length,
            "experts": config.experts,
            "parameters": sum(weights.values()),
            "quant": weights.most_common(1)[0][0],
            "file_bytes": file.file_bytes,
            "predictor": None,
            "synthetic": config.synthetic,
        }
