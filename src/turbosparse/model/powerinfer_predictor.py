"""Our predictors in PowerInfer's form: they read the residual stream r, and one threshold holds for all layers.

Predictors of ours that read the residual stream have a threshold each. Scores have no unit, so a layer's `fc2` is
scaled until its threshold is that of the others.

Those that read the FFN's normed input x = w r / rms(r) select where fc2 relu(fc1 x) >= t. relu(a z) = a relu(z) for
a > 0, so this is fc2 relu(fc1 w r) - t rms(r) >= 0: w moves into `fc1`, the common threshold is 0, and rms(r) becomes a
part of the network. For a random direction g, |g r| = relu(g r) + relu(-g r) is rms(r) on average, up to a factor; the
mean over 32 directions is within 13 % of it (one standard deviation), which moves a threshold by as much.

A layer without a predictor gets one that scores 0, so that every neuron reaches a threshold of 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from turbosparse.errors import UserError
from turbosparse.model.config import ModelConfig
from turbosparse.model.gguf import GGUFFile, GGUFTensor
from turbosparse.model.gguf_copy import Copy, copy_tensor
from turbosparse.model.quantize import WRITABLE, dequantize, dequantize_rows, quantize, row_chunks, writable_type

Type = GGMLQuantizationType
Floats = npt.NDArray[np.float32]

_DIRECTIONS = 32
_EMPTY_RANK = 32


def common_threshold(config: ModelConfig, source: str) -> float:
    """The threshold that all layers can have; errors call the file `source`.

    Raises:
        UserError: predictors of the residual stream whose thresholds lie on both sides of zero, or are above zero
            while a layer has no predictor.
    """
    predictor = config.predictor
    if predictor is None or predictor.input != "residual":
        return 0.0
    thresholds = [t for t, rank in zip(predictor.thresholds, predictor.ranks, strict=True) if rank > 0]
    signs = {math.copysign(1.0, t) if t else 0.0 for t in thresholds}
    if len(signs) > 1 or (signs == {1.0} and min(predictor.ranks) == 0):
        raise UserError(
            f"{source}: the thresholds of its predictors cannot be one for all layers, as PowerInfer needs; "
            "train predictors anew with `turbosparse train-predictors`."
        )
    return thresholds[0]


def predictor_copies(file: GGUFFile, config: ModelConfig, threshold: float) -> list[Copy]:
    """`fc1` and `fc2` of every layer, whose scores are to be compared with `common_threshold`."""
    copies: list[Copy] = []
    for layer in range(config.n_layers):
        predictor = config.predictor
        if predictor is None or predictor.ranks[layer] == 0:
            copies += _everything(config, layer)
            continue
        fc1, fc2 = (file.tensors[f"blk.{layer}.{name}.weight"] for name in ("fc1", "fc2"))
        own = predictor.thresholds[layer]
        if predictor.input == "normed":
            norm = file.tensors[f"blk.{layer}.ffn_norm.weight"]
            copies += _reading_residual(fc1, fc2, dequantize(norm.data, norm.type, norm.shape), own)
        elif own == threshold:
            copies += [copy_tensor(fc1), copy_tensor(fc2)]
        else:
            copies += [copy_tensor(fc1), _changed(fc2, threshold / own, 0.0, 0)]
    return copies


def _everything(config: ModelConfig, layer: int) -> list[Copy]:
    copies = []
    for name, shape in (("fc1", (_EMPTY_RANK, config.hidden_size)), ("fc2", (config.ffn_size, _EMPTY_RANK))):
        kind = writable_type(Type.Q4_0, shape[1])
        copies.append(Copy(f"blk.{layer}.{name}.weight", shape, kind, partial(_zeros, shape, kind)))
    return copies


def _zeros(shape: tuple[int, int], kind: Type) -> Iterator[npt.NDArray[np.uint8]]:
    yield quantize(np.zeros(shape, np.float32), kind)


def _reading_residual(fc1: GGUFTensor, fc2: GGUFTensor, norm: Floats, threshold: float) -> list[Copy]:
    hidden = norm.size
    directions = _directions(hidden)
    shape = (fc1.shape[0] + 2 * _DIRECTIONS, hidden)
    kind = _kind(fc1, hidden)

    def parts() -> Iterator[npt.NDArray[np.uint8]]:
        for start, stop in row_chunks(*fc1.shape):
            yield quantize(dequantize_rows(fc1, start, stop) * norm, kind)
        yield quantize(directions, kind)
        yield quantize(-directions, kind)

    return [Copy(fc1.name, shape, kind, parts), _changed(fc2, 1.0, -threshold, 2 * _DIRECTIONS)]


def _directions(hidden: int) -> Floats:
    """Rows g, [_DIRECTIONS, hidden], the sum of whose |g r| is about rms(r).

    Each column's mean magnitude is that of the normal distribution, so that the sum is right for a stream with one
    channel far above the others too, as language models have.
    """
    normal = np.random.default_rng(0).standard_normal((_DIRECTIONS, hidden))
    normal *= math.sqrt(2 / math.pi) / np.abs(normal).mean(axis=0)
    return (normal / (_DIRECTIONS * math.sqrt(2 / math.pi) * math.sqrt(hidden))).astype(np.float32)


def _changed(fc2: GGUFTensor, factor: float, constant: float, columns: int) -> Copy:
    """factor * fc2, and so many columns more that hold a constant."""
    rows, rank = fc2.shape
    kind = _kind(fc2, rank + columns)

    def parts() -> Iterator[npt.NDArray[np.uint8]]:
        for start, stop in row_chunks(rows, rank + columns):
            more = np.full((stop - start, columns), constant, np.float32)
            yield quantize(np.hstack([dequantize_rows(fc2, start, stop) * np.float32(factor), more]), kind)

    return Copy(fc2.name, (rows, rank + columns), kind, parts)


def _kind(tensor: GGUFTensor, columns: int) -> Type:
    return writable_type(tensor.type if tensor.type in WRITABLE - {Type.BF16} else Type.F16, columns)
