"""Predictors beside the weights of a Hugging Face folder, for whoever exports it later: one safetensors file.

Of gates that predict it holds thresholds and promises alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from turbosparse.errors import UserError
from turbosparse.model.config import ModelConfig
from turbosparse.model.export import ExportReport, Progress, export_gguf, refuse_own_file, replacing
from turbosparse.model.gguf import GGUFFile
from turbosparse.model.quantize import writable_type
from turbosparse.predict.write import StoredPredictor, write_predictors

FILE = "predictors.safetensors"
_THRESHOLDS = "predictor.threshold"
_KEPT = "predictor.recall"


def save_folder(folder: Path, predictors: Sequence[StoredPredictor]) -> None:
    """Write `FILE`: matrices in F16 under Hugging Face's names, thresholds and promises of all layers in F32."""
    tensors: dict[str, npt.NDArray[Any]] = {
        _THRESHOLDS: np.array([layer.threshold for layer in predictors], np.float32),
        _KEPT: np.array([layer.kept for layer in predictors], np.float32),
    }
    for index, layer in enumerate(predictors):
        if not layer.rank:
            continue
        for name, matrix in zip(_names(index), layer.matrices(), strict=True):
            tensors[name] = matrix.astype(np.float16)
    with replacing(folder / FILE) as partial:
        save_file(tensors, partial)


def load_folder(folder: Path, kind: Type) -> list[StoredPredictor]:
    """The predictors of a folder, to be stored as `kind`.

    Raises:
        UserError: the file is not what `save_folder` writes.
    """
    path = folder / FILE
    try:
        tensors = load_file(path)
        thresholds = tensors.pop(_THRESHOLDS).astype(np.float32)
        kept = tensors.pop(_KEPT, np.zeros_like(thresholds)).astype(np.float32)
        if kept.shape != thresholds.shape or not ((kept >= 0) & (kept <= 1)).all():
            raise ValueError("the shares that its layers keep are none")
        if not tensors:
            return [StoredPredictor.of_gate(*map(float, layer)) for layer in zip(thresholds, kept, strict=True)]
        predictors = []
        for index, threshold in enumerate(thresholds):
            fc1, fc2 = (tensors.pop(name).astype(np.float32) for name in _names(index))
            if fc1.ndim != 2 or fc2.ndim != 2 or len(fc1) != fc2.shape[1]:
                raise ValueError(f"the matrices of layer {index} do not fit")
            kinds = writable_type(kind, fc1.shape[1]), writable_type(kind, fc2.shape[1])
            predictors.append(StoredPredictor.of(fc1, fc2, kinds, float(threshold), float(kept[index])))
        if tensors:
            raise ValueError(f"it has a tensor {min(tensors)[:80]!r}")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} holds no predictors ({error}); delete it, or train them again.") from None
    return predictors


def attach(folder: Path, path: Path) -> None:
    """Put the predictors of a folder into the GGUF file that was exported from it, if there are some.

    Raises:
        UserError: they are not those of this model.
    """
    if not (folder / FILE).is_file():
        return
    with GGUFFile.open(path) as file:
        config = ModelConfig.from_gguf(file)
        if not config.sparse or config.experts:
            raise UserError(f"{folder / FILE}: predictors are for sparse models with one FFN a layer; delete it.")
        kind = file.tensors["blk.0.ffn_gate.weight"].type
        predictors = load_folder(folder, kind)
        shapes = {(layer.shapes[0][1], layer.shapes[1][0]) for layer in predictors if layer.rank}
        if len(predictors) != config.n_layers or not shapes <= {(config.hidden_size, config.ffn_size)}:
            raise UserError(f"{folder / FILE} is of another model; delete it, or train predictors for this one.")
        write_predictors(file, path, predictors)


def export_with_predictors(folder: Path, out: Path, quant: str, progress: Progress | None = None) -> ExportReport:
    """`export_gguf`, with the predictors of the folder: the file appears when they are in it.

    Raises:
        UserError: as `export_gguf` and `attach`. Nothing is left then, and a file that was there stays.
    """
    refuse_own_file(folder, out)
    with replacing(out) as partial:
        report = export_gguf(folder, partial, quant, progress)
        attach(folder, partial)
        return dataclasses.replace(report, path=out, file_bytes=partial.stat().st_size)


def _names(layer: int) -> tuple[str, str]:
    first, second = (f"model.layers.{layer}.mlp.predictor.{name}.weight" for name in ("fc1", "fc2"))
    return first, second
