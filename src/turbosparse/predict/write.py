"""A GGUF file again, with predictors: every other key and tensor is copied."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter

from turbosparse.model.config import Predictor
from turbosparse.model.export import replacing
from turbosparse.model.export_metadata import write_predictor
from turbosparse.model.families import ARCHITECTURE
from turbosparse.model.gguf import GGUFFile
from turbosparse.model.gguf_copy import Copy, copy_key, copy_tensor, write_copies
from turbosparse.model.quantize import dequantize, quantize

Floats = npt.NDArray[np.float32]
_KEYS = "turbosparse.predictor."
_WRITTEN = ("general.architecture", "general.alignment")  # by the writer, which aligns to 32 bytes
_MOST = 0.9999  # that is promised: nobody keeps everything for ever
_MATRICES = (".fc1.weight", ".fc2.weight")


@dataclass(frozen=True)
class StoredPredictor:
    """One layer's predictor as it is stored.

    Attributes:
        fc1, fc2: uint8 [rows, bytes of a row].
        kinds: their types.
        shapes: (rank, hidden) and (ffn, rank).
        threshold: a neuron is selected where its score reaches it.
        kept: share of |h| that this keeps on held-out text; 0 where it was not measured.

    A gate that is its own predictor has a rank of 0.
    """

    fc1: npt.NDArray[np.uint8]
    fc2: npt.NDArray[np.uint8]
    kinds: tuple[Type, Type]
    shapes: tuple[tuple[int, int], tuple[int, int]]
    threshold: float
    kept: float = 0.0

    @classmethod
    def of(
        cls, fc1: Floats, fc2: Floats, kinds: tuple[Type, Type], threshold: float = 0.0, kept: float = 0.0
    ) -> StoredPredictor:
        """Matrices [rank, hidden] and [ffn, rank] in their types."""
        (rank, hidden), (ffn, _) = fc1.shape, fc2.shape
        shapes = (rank, hidden), (ffn, rank)
        return cls(quantize(fc1, kinds[0]), quantize(fc2, kinds[1]), kinds, shapes, threshold, kept)

    @classmethod
    def of_gate(cls, threshold: float = 0.0, kept: float = 0.0) -> StoredPredictor:
        """The gate itself: only a threshold."""
        nothing = np.empty((0, 0), np.uint8)
        return cls(nothing, nothing, (Type.F32, Type.F32), ((0, 0), (0, 0)), threshold, kept)

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


def write_predictors(file: GGUFFile, out: Path, predictors: Sequence[StoredPredictor]) -> None:
    """Write `file` to `out` with one predictor a layer, which reads the FFN's normed input; it replaces those it had.

    Either all of them have matrices, or all are gates.

    Raises:
        UserError: `out` cannot be written.
    """
    tensors = [copy_tensor(tensor) for name, tensor in file.tensors.items() if not name.endswith(_MATRICES)]
    trained = [(index, layer) for index, layer in enumerate(predictors) if layer.rank]
    for index, layer in trained:
        for name, rows, kind, shape in zip(_MATRICES, (layer.fc1, layer.fc2), layer.kinds, layer.shapes, strict=True):
            tensors.append(Copy(f"blk.{index}{name}", shape, kind, partial(_whole, rows)))
    ranks, thresholds, kept = (
        tuple(getattr(layer, name) for layer in predictors) for name in ("rank", "threshold", "kept")
    )
    promised = tuple(min(share, _MOST) for share in kept) if any(kept) else None
    with replacing(out) as unfinished:
        writer = GGUFWriter(unfinished, ARCHITECTURE)
        try:
            for key in file.metadata:
                if not key.startswith(_KEYS) and key not in _WRITTEN:
                    copy_key(file, key, writer)
            write_predictor(
                writer, Predictor(ranks, thresholds, "normed" if trained else "gate", promised), ARCHITECTURE
            )
            write_copies(writer, tensors, None)
        finally:
            writer.close()


def _whole(rows: npt.NDArray[np.uint8]) -> Iterator[npt.NDArray[np.uint8]]:
    yield rows.reshape(-1)
