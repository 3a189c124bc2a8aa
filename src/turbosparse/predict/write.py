"""A GGUF file again, with predictors: every other key and tensor is copied byte for byte."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType

from turbosparse.model.export import replacing
from turbosparse.model.gguf import GGUFFile
from turbosparse.model.quantize import dequantize, quantize

Floats = npt.NDArray[np.float32]
_KEYS = "turbosparse.predictor."


@dataclass(frozen=True)
class StoredPredictor:
    """One layer's predictor as it is stored.

    Attributes:
        fc1, fc2: uint8 [rows, bytes of a row].
        kinds: their types.
        shapes: (rank, hidden) and (ffn, rank).
        threshold: a neuron is selected where its score reaches it.
    """

    fc1: npt.NDArray[np.uint8]
    fc2: npt.NDArray[np.uint8]
    kinds: tuple[Type, Type]
    shapes: tuple[tuple[int, int], tuple[int, int]]
    threshold: float

    @classmethod
    def of(cls, fc1: Floats, fc2: Floats, kinds: tuple[Type, Type], threshold: float = 0.0) -> StoredPredictor:
        """Matrices [rank, hidden] and [ffn, rank] in their types."""
        (rank, hidden), (ffn, _) = fc1.shape, fc2.shape
        return cls(quantize(fc1, kinds[0]), quantize(fc2, kinds[1]), kinds, ((rank, hidden), (ffn, rank)), threshold)

    def matrices(self) -> tuple[Floats, Floats]:
        """fc1 and fc2 as a reader gets them."""
        first, second = (
            dequantize(rows.reshape(-1), kind, shape)
            for rows, kind, shape in zip((self.fc1, self.fc2), self.kinds, self.shapes, strict=True)
        )
        return first, second

    @property
    def rank(self) -> int:
        return self.shapes[0][0]

    @property
    def nbytes(self) -> int:
        return self.fc1.nbytes + self.fc2.nbytes


def write_predictors(
    file: GGUFFile, out: Path, predictors: Sequence[StoredPredictor], recall: float | None = None
) -> None:
    """Write `file` to `out` with one predictor a layer, which reads the FFN's normed input; it replaces those it had.

    `recall` is the share of |h| that the thresholds keep; 1 and None promise nothing.

    Raises:
        UserError: `out` cannot be written.
    """
    keys = [file.record(key) for key in file.metadata if not key.startswith(_KEYS)]
    keys += [
        _record("rank", _array(GGUFValueType.UINT32, "I", [layer.rank for layer in predictors])),
        _record("threshold", _array(GGUFValueType.FLOAT32, "f", [layer.threshold for layer in predictors])),
        _record("input", struct.pack("<I", GGUFValueType.STRING) + _text("normed")),
    ]
    if recall is not None and recall < 1:
        keys.append(_record("recall", struct.pack("<If", GGUFValueType.FLOAT32, recall)))
    tensors: list[tuple[str, Type, tuple[int, ...], npt.NDArray[np.uint8]]] = [
        (name, tensor.type, tensor.shape, tensor.data)
        for name, tensor in file.tensors.items()
        if not name.endswith((".fc1.weight", ".fc2.weight"))
    ]
    for index, layer in enumerate(predictors):
        for name, data, kind, sizes in zip(
            ("fc1", "fc2"), (layer.fc1, layer.fc2), layer.kinds, layer.shapes, strict=True
        ):
            tensors.append((f"blk.{index}.{name}.weight", kind, sizes, data.reshape(-1)))
    with replacing(out) as partial, partial.open("wb") as stream:
        stream.write(b"GGUF" + struct.pack("<IQQ", file.version, len(tensors), len(keys)) + b"".join(keys))
        offset = 0
        for name, kind, shape, data in tensors:
            stream.write(_text(name) + struct.pack("<I", len(shape)))
            stream.write(struct.pack(f"<{len(shape)}QIQ", *reversed(shape), kind, offset))
            offset = _aligned(offset + data.nbytes, file.alignment)
        for _, _, _, data in tensors:
            _pad(stream, file.alignment)
            data.tofile(stream)


def _record(name: str, value: bytes) -> bytes:
    return _text(_KEYS + name) + value


def _array(kind: GGUFValueType, letter: str, values: Sequence[float]) -> bytes:
    head = struct.pack("<IIQ", GGUFValueType.ARRAY, kind, len(values))
    return head + struct.pack(f"<{len(values)}{letter}", *values)


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _aligned(position: int, alignment: int) -> int:
    return math.ceil(position / alignment) * alignment


def _pad(stream: BinaryIO, alignment: int) -> None:
    stream.write(bytes(_aligned(stream.tell(), alignment) - stream.tell()))
