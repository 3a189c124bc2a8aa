"""Write a model that PowerInfer's authors published as one file of ours: from their GGUF, or a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
from gguf import GGUFWriter

from turbosparse.errors import UserError
from turbosparse.model.config import ModelConfig, Predictor
from turbosparse.model.export import ExportReport, Progress, export_gguf, refuse_own_file, replacing
from turbosparse.model.export_metadata import architecture_of, write_hyperparameters
from turbosparse.model.gguf import POWERINFER_MAGIC, GGUFFile
from turbosparse.model.gguf_copy import copy_key, copy_tensor, write_copies
from turbosparse.model.layout import EMBEDDING, OUTPUT

# What `write_hyperparameters` states anew.
_OWN_KEYS = ("general.architecture", "general.alignment", "general.quantization_version")


def import_model(
    source: Path, out: Path, quant: str | None, threshold: float | None, progress: Progress | None = None
) -> ExportReport:
    """Write a PowerInfer file, or a published sparse Hugging Face folder, as a file of ours.

    Args:
        source: the file, a folder with one such file in it, or a Hugging Face folder.
        out: the file to write.
        quant: of a Hugging Face folder's matrices, as in `export_gguf`; None: q4_0. Not for files.
        threshold: of the predictors' scores; None: what the source says, or 0.
        progress: called with (weights done, weights in all).

    Raises:
        UserError: the source is neither, or the file cannot be written or is the source.
    """
    if source.is_dir() and (source / "config.json").is_file():
        return export_gguf(source, out, quant or "q4_0", progress, threshold)
    if source.is_dir():
        source = _only_file(source)
    refuse_own_file(source, out)
    if quant is not None:
        raise UserError(f"--quant {quant}: the weights of {source} stay as they are stored; leave the option out.")
    with GGUFFile.open(source) as file, replacing(out) as partial:
        if file.magic != POWERINFER_MAGIC:
            raise UserError(f"{source} is no file of PowerInfer, which begins with PWRI; it may run as it is.")
        return _rewrite(file, partial, out, threshold, progress)


def _only_file(folder: Path) -> Path:
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise UserError(f"{folder} has neither a config.json nor one GGUF file but {len(files)}; give the file itself.")
    return files[0]


def _rewrite(
    file: GGUFFile, partial: Path, out: Path, threshold: float | None, progress: Progress | None
) -> ExportReport:
    config = ModelConfig.from_gguf(file)
    assert config.predictor is not None
    if threshold is not None:
        predictor = Predictor(config.predictor.ranks, (threshold,) * config.n_layers, "residual")
        config = dataclasses.replace(config, predictor=predictor)
    tensors = [copy_tensor(tensor) for tensor in file.tensors.values()]
    if _tied(file):  # its program needs both
        tensors = [tensor for tensor in tensors if tensor.name != OUTPUT]
    writer = GGUFWriter(partial, architecture_of(config))
    try:
        for key in file.metadata:
            if key.startswith(("general.", "tokenizer.", "turbosparse.")) and key not in _OWN_KEYS:
                copy_key(file, key, writer)
        write_hyperparameters(writer, config, None)
        write_copies(writer, tensors, progress)
    finally:
        writer.close()
    parameters = sum(math.prod(tensor.shape) for tensor in tensors)
    kind = max(tensors, key=lambda tensor: math.prod(tensor.shape)).kind.name.lower()
    return ExportReport(out, parameters, partial.stat().st_size, kind, architecture_of(config))


def _tied(file: GGUFFile) -> bool:
    output, embedding = file.tensors.get(OUTPUT), file.tensors[EMBEDDING]
    return output is not None and output.type is embedding.type and np.array_equal(output.data, embedding.data)
