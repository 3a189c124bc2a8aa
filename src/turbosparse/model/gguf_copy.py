"""Parts of one GGUF file for another: keys with their types, texts and weights byte for byte."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

from turbosparse.model.export import Progress, TensorStream
from turbosparse.model.gguf import GGUFFile, GGUFTensor, nbytes_of, row_bytes
from turbosparse.model.quantize import dequantize_rows, negate, quantize, row_chunks

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


@dataclass(frozen=True)
class Copy:
    """A tensor to write.

    Attributes:
        name: in the new file.
        shape: numpy order.
        kind: how it is stored.
        parts: its bytes, uint8, in parts that are made while they are written.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    parts: Callable[[], Iterator[npt.NDArray[np.uint8]]]


def copy_tensor(tensor: GGUFTensor, kind: GGMLQuantizationType | None = None, name: str | None = None) -> Copy:
    """A tensor of another file, as it is, or in another type or by another name."""
    kind = tensor.type if kind is None else kind
    return Copy(name or tensor.name, tensor.shape, kind, lambda: _parts(tensor, kind))


def repeat_rows(copy: Copy, times: int) -> Copy:
    """A matrix with each of its rows so many times, side by side."""
    rows, columns = copy.shape
    stride = row_bytes(copy.kind, columns)

    def parts() -> Iterator[npt.NDArray[np.uint8]]:
        for part in copy.parts():
            yield part.reshape(-1, stride).repeat(times, axis=0)

    return Copy(copy.name, (times * rows, columns), copy.kind, parts)


def mirror_rows(copy: Copy) -> Copy:
    """A matrix of a `NEGATABLE` type with each of its rows twice, side by side, the second one with the other sign."""
    rows, columns = copy.shape
    stride = row_bytes(copy.kind, columns)

    def parts() -> Iterator[npt.NDArray[np.uint8]]:
        for part in copy.parts():
            first = part.reshape(-1, stride)
            yield np.stack([first, negate(first, copy.kind)], axis=1)

    return Copy(copy.name, (2 * rows, columns), copy.kind, parts)


def _parts(tensor: GGUFTensor, kind: GGMLQuantizationType) -> Iterator[npt.NDArray[np.uint8]]:
    columns = tensor.shape[-1]
    stride = row_bytes(tensor.type, columns)
    for start, stop in row_chunks(tensor.size // columns, columns):
        if tensor.type is kind:
            yield tensor.data[start * stride : stop * stride]
        else:
            yield quantize(dequantize_rows(tensor, start, stop), kind)


def write_copies(writer: GGUFWriter, tensors: Sequence[Copy], progress: Progress | None) -> None:
    """Write header, keys and `tensors`; `progress` is called with (weights done, weights in all)."""
    for tensor in tensors:
        nbytes = nbytes_of(tensor.kind, tensor.shape)
        # A dtype other than uint8 says that the shape counts elements.
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), nbytes, raw_dtype=tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    done, total = 0, sum(math.prod(tensor.shape) for tensor in tensors)
    for tensor in tensors:
        stream: Any = TensorStream(tensor.parts(), nbytes_of(tensor.kind, tensor.shape))
        writer.write_tensor_data(stream)
        done += math.prod(tensor.shape)
        if progress is not None:
            progress(done, total)


def copy_key(file: GGUFFile, key: str, writer: GGUFWriter) -> None:
    """Give `writer` a key of `file`; an empty array, which means nothing, is left out."""
    record, value = file.record(key), file.metadata[key]
    start = _U64.size + len(key.encode())
    kind = GGUFValueType(_U32.unpack_from(record, start)[0])
    if kind is GGUFValueType.STRING:
        writer.add_key_value(key, record[start + _U32.size + _U64.size :], kind)
    elif kind is not GGUFValueType.ARRAY:
        writer.add_key_value(key, value, kind)
    elif value:
        entries = GGUFValueType(_U32.unpack_from(record, start + _U32.size)[0])
        texts = entries is GGUFValueType.STRING
        first = start + 2 * _U32.size + _U64.size
        writer.add_key_value(key, list(_texts(record, first)) if texts else value, kind, entries)


def _texts(record: bytes, position: int) -> Iterator[bytes]:
    while position < len(record):
        start = position + _U64.size
        position = start + _U64.unpack_from(record, position)[0]
        yield record[start:position]
