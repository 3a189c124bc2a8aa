"""The tensors of a GGUF file on their way into the native model, in types that have kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

from turbosparse import _native
from turbosparse.model.gguf import GGUFFile, GGUFTensor
from turbosparse.model.quantize import dequantize, quantize

Progress = Callable[[int, int], None]

_NATIVE_TYPES = frozenset({Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0})


def load_tensors(file: GGUFFile, model: _native.Model, exact: bool, progress: Progress | None) -> None:
    """Pack all tensors of a file into a model; progress is called with (bytes done, bytes in all)."""
    total = sum(tensor.data.size for tensor in file.tensors.values())
    done = 0
    model.after_piece(file.release_pages)  # the packed copy is enough: two of a large model may not fit
    for name, tensor in file.tensors.items():
        if len(tensor.shape) == 1:
            model.set_vector(name, dequantize(tensor.data, tensor.type, tensor.shape))
        for expert, matrix in enumerate(_matrices(tensor)):
            rows, columns = matrix.shape
            kind, data = _packable(matrix, exact)
            model.set_matrix(name, expert, int(kind), rows, columns, data)
        done += tensor.data.size
        if progress is not None:
            progress(done, total)
    model.finish()


def _matrices(tensor: GGUFTensor) -> Iterator[GGUFTensor]:
    """The matrix that a tensor is, or those of the experts that it holds; nothing of a vector."""
    if len(tensor.shape) == 2:
        yield tensor
    if len(tensor.shape) == 3:
        for data in tensor.data.reshape(tensor.shape[0], -1):
            yield dataclasses.replace(tensor, shape=tensor.shape[1:], data=data)


def _packable(tensor: GGUFTensor, exact: bool) -> tuple[Type, npt.NDArray[np.uint8]]:
    """A matrix in a type that has kernels; what has none is converted, to fp32 where results must be exact."""
    if tensor.type in _NATIVE_TYPES:
        return tensor.type, tensor.data
    columns = tensor.shape[1]
    values = dequantize(tensor.data, tensor.type, tensor.shape)
    if exact:
        return Type.F32, values.reshape(-1).view(np.uint8)
    kind = Type.F16 if columns % 32 else Type.Q8_0
    return kind, quantize(values, kind).reshape(-1)
