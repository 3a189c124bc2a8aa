"""`turbosparse info`: what a model file is, without running it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from turbosparse.cli import output
from turbosparse.cli.options import Json, Model

if TYPE_CHECKING:
    from turbosparse.model.config import ModelConfig
    from turbosparse.model.gguf import GGUFTensor


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
        if isinstance(value, dict):
            shown = "the gates themselves"
            if value["ranks"]:
                shown = f"ranks {value['ranks'][0]} to {value['ranks'][1]}, {value['share']:.1%} of the FFN's bytes"
        table.add_row(key.replace("_", " "), output.plain("-" if value is None else shown))
    output.stdout_console().print(table)


def _predictor(config: ModelConfig, tensors: Mapping[str, GGUFTensor]) -> dict[str, Any] | None:
    """Predictors of a file: what they read, the widths of those layers that have one, and their share of FFN bytes.

    Gates that predict are no bytes of their own, and have no width.
    """
    if config.predictor is None:
        return None
    parts: dict[str, int] = {"fc": 0, "ffn": 0}
    for name, tensor in tensors.items():
        part = re.match(r"blk\.\d+\.(fc|ffn)(?!_norm|_gate_inp)", name)
        if part is not None:
            parts[part[1]] += tensor.data.size
    ranks = [rank for rank in config.predictor.ranks if rank > 0]
    return {
        "input": config.predictor.input,
        "layers": len(ranks) or config.n_layers,
        "ranks": [min(ranks), max(ranks)] if ranks else None,
        "bytes": parts["fc"],
        "share": parts["fc"] / parts["ffn"],
    }


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
            "neurons_per_gate": config.neurons_per_gate,
            "mirrored_ups": config.mirrored_ups,
            "heads": config.n_heads,
            "kv_heads": config.n_kv_heads,
            "vocab_size": config.vocab_size,
            "context_length": config.context_length,
            "experts": config.experts,
            "experts_used": config.experts_used,
            "parameters": sum(weights.values()),
            "quant": weights.most_common(1)[0][0],
            "file_bytes": file.file_bytes,
            "predictor": _predictor(config, file.tensors),
            "synthetic": config.synthetic,
        }
