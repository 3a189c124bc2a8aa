"""Read GGUF files from anywhere, trusting none of them.

The file is mapped, not loaded: opening costs the header and the metadata, and a tensor costs nothing until its bytes
are touched. Every count, length and offset in the header comes from outside, so each is compared with what the file
can hold before it is used, and each thing that cannot be true is one `UserError` that names the file and the key or
tensor. Tensors may not overlap: no writer makes such files, and a damaged table of contents often looks like one.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little endian).
"""

from __future__ import annotations

import contextlib
import itertools
import math
import mmap
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from turbosparse.errors import UserError
from turbosparse.model.gguf_cursor import Cursor
from turbosparse.model.gguf_parts import SPLIT_KEYS, check_part, later_parts

Value = int | float | bool | str | list[int] | list[float] | list[bool] | list[str]

MAGIC = b"GGUF"
POWERINFER_MAGIC = b"PWRI"  # the same container (powerinfer.py)
MAGICS = frozenset({MAGIC, POWERINFER_MAGIC})
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
ALIGNMENT_RANGE = (8, 1 << 20)
MAX_DIMENSIONS = 4
# No known model has a thousandth of these. They bound the Python objects that a small hostile file can ask for.
MAX_ITEMS = 1 << 20
MAX_ARRAY_ENTRIES = 1 << 24

# Smallest possible records: an empty name (8), a value type (4), one byte;
# an empty name (8), n_dims (4), one dimension (8), a tensor type (4), an offset (8).
_MIN_KEY_BYTES = 13
_MIN_TENSOR_BYTES = 32

_SCALARS: dict[GGUFValueType, np.dtype[np.generic]] = {
    GGUFValueType.UINT8: np.dtype("u1"),
    GGUFValueType.INT8: np.dtype("i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.BOOL: np.dtype("u1"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
}


@dataclass(frozen=True, eq=False)
class GGUFTensor:
    """One tensor of a mapped file.

    Attributes:
        name: its name in the file, `blk.0.ffn_up.weight`.
        type: the ggml storage type of `data`.
        shape: numpy order, rows first; the last dimension is contiguous and a whole number of quantisation blocks.
        data: flat read-only uint8 view into the map, `nbytes_of(type, shape)` long.
    """

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class GGUFFile:
    """A GGUF file, or a model in several (gguf_parts.py), mapped read-only. Use as a context manager, or call `close`.

    Attributes:
        path: where it lies; of several files the first.
        magic: its first four bytes, one of `MAGICS`.
        version: 2 or 3.
        metadata: key to plain Python value; arrays are lists. Text in values that is not UTF-8 is decoded with U+FFFD.
        tensors: name to `GGUFTensor`, in the order of the file.
        alignment: of tensor offsets, bytes.
        file_bytes: size of the file, or of all of them.
    """

    path: Path
    magic: bytes
    version: int
    metadata: dict[str, Value]
    tensors: dict[str, GGUFTensor]
    alignment: int
    file_bytes: int

    def __init__(self, path: Path, buffer: mmap.mmap) -> None:
        """Parse a mapped file; use `open`."""
        self.path = path
        self._buffer = buffer
        self._later: list[GGUFFile] = []
        self.file_bytes = len(buffer)
        cursor = Cursor(path, buffer)
        self.magic, self.version, n_tensors, n_keys = _read_header(cursor)
        self._spans: dict[str, tuple[int, int]] = {}
        self.metadata = _read_metadata(cursor, n_keys, self._spans)
        self.alignment = _alignment(cursor, self.metadata)
        self.tensors = _read_tensors(cursor, n_tensors, self.alignment)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> GGUFFile:
        """Map the file at `path`, and the others where it is the first of several, and check all of the headers.

        Raises:
            UserError: there is no such file, it is not GGUF, its header cannot be true, or parts do not fit together.
        """
        file = cls._map(Path(path))
        try:
            later = later_parts(file.path, file.metadata)
            for place, part in enumerate(later, 1):
                file._join(cls._map(part), place, 1 + len(later))
            file._check_joined()
        except BaseException:
            file.close()
            raise
        return file

    @classmethod
    def _map(cls, path: Path) -> GGUFFile:
        try:
            with path.open("rb") as handle:
                status = os.fstat(handle.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise UserError(f"{path} is not a regular file; give the path of a GGUF file.")
                if status.st_size == 0:
                    raise UserError(f"{path} is empty; download or export it again.")
                buffer = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        except IsADirectoryError as error:
            raise UserError(f"{path} is a folder, not a GGUF file; export it with `turbosparse export`.") from error
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"{str(path)!r} cannot be read ({reason}); give the path of a GGUF file.") from error
        try:
            return cls(path, buffer)
        except BaseException:
            _close(buffer)
            raise

    def _join(self, part: GGUFFile, place: int, count: int) -> None:
        """Take over the tensors of the part that stands at `place`, counted from 0, of so many."""
        self._later.append(part)  # first of all, so that it is closed whatever comes
        check_part(part.path, part.metadata, place, count)
        if part.magic != self.magic:
            raise UserError(f"{part.path} starts with {part.magic!r}, unlike {self.path}; it is of another model.")
        if twice := next((name for name in part.tensors if name in self.tensors), None):
            raise UserError(f"{part.path} has the {_shown('tensor', twice)}, which a part before it has too.")
        self.tensors |= part.tensors
        self.file_bytes += part.file_bytes

    def _check_joined(self) -> None:
        """Whether all tensors are there; what says that there were parts is forgotten, as no copy of it has them."""
        wanted = self.metadata.get("split.tensors.count")
        if self._later and wanted is not None and wanted != len(self.tensors):
            raise UserError(
                f"{self.path} names {str(wanted)[:40]} tensors but its {1 + len(self._later)} parts hold "
                f"{len(self.tensors)}; download them again."
            )
        for key in SPLIT_KEYS:
            self.metadata.pop(key, None)

    def record(self, key: str) -> bytes:
        """A key with its type and value as the file holds it, to be copied byte for byte."""
        start, stop = self._spans[key]
        return self._buffer[start:stop]

    def release_pages(self) -> None:
        """Stop holding in memory what was read so far; it is still there, and read anew from the file if needed."""
        if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            self._buffer.madvise(mmap.MADV_DONTNEED)
        for part in self._later:
            part.release_pages()

    def close(self) -> None:
        """Drop the tensors and unmap the file. Views that the caller still holds keep the map alive until they go."""
        self.tensors = {}
        _close(self._buffer)
        for part in self._later:
            part.close()

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def row_bytes(kind: GGMLQuantizationType, length: int) -> int:
    """Bytes of one row of `length` elements.

    Raises:
        ValueError: `length` is not a whole number of blocks.
    """
    block, size = GGML_QUANT_SIZES[kind]
    if length % block:
        raise ValueError(f"a row of {length} is not a whole number of {kind.name} blocks of {block}")
    return length // block * size


def nbytes_of(kind: GGMLQuantizationType, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of this type and shape (numpy order)."""
    return math.prod(shape[:-1]) * row_bytes(kind, shape[-1])


def _read_header(cursor: Cursor) -> tuple[bytes, int, int, int]:
    """Magic, version, number of tensors, number of metadata keys."""
    magic = cursor.buffer[cursor.take(4, "the magic") : cursor.position]
    if magic not in MAGICS:
        cursor.fail(f"it starts with {magic!r} instead of b'GGUF'")
    version = cursor.u32("the version")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        hint = " (a big-endian file)" if swapped in VERSIONS else ""
        cursor.fail(f"its version is {version}{hint}; versions 2 and 3, little endian, are read")
    n_tensors = cursor.u64("the tensor count")
    n_keys = cursor.u64("the key count")
    for what, count, size in (("tensors", n_tensors, _MIN_TENSOR_BYTES), ("keys", n_keys, _MIN_KEY_BYTES)):
        if count > min(MAX_ITEMS, cursor.left // size):
            cursor.fail(f"it claims {count} {what}, more than a file of {len(cursor.buffer)} bytes may hold")
    return magic, version, n_tensors, n_keys


def _read_metadata(cursor: Cursor, count: int, spans: dict[str, tuple[int, int]]) -> dict[str, Value]:
    """Key to value; where the record of each key lies goes into `spans`."""
    metadata: dict[str, Value] = {}
    for index in range(count):
        start = cursor.position
        key = cursor.name(f"key {index}")
        shown = _shown("key", key)
        if key in metadata:
            cursor.fail(f"{shown} appears twice")
        kind = _value_type(cursor, shown)
        metadata[key] = _read_array(cursor, shown) if kind is GGUFValueType.ARRAY else _read_scalar(cursor, kind, shown)
        spans[key] = (start, cursor.position)
    return metadata


def _value_type(cursor: Cursor, shown: str) -> GGUFValueType:
    code = cursor.u32(shown)
    try:
        return GGUFValueType(code)
    except ValueError:
        cursor.fail(f"{shown} has the unknown value type {code}")


def _read_scalar(cursor: Cursor, kind: GGUFValueType, shown: str) -> Value:
    if kind is GGUFValueType.STRING:
        return cursor.text(shown).decode("utf-8", "replace")
    value: int | float = cursor.array(_SCALARS[kind], 1, shown).tolist()[0]
    return _as_bool(cursor, value, shown) if kind is GGUFValueType.BOOL else value


def _read_array(cursor: Cursor, shown: str) -> Value:
    kind = _value_type(cursor, shown)
    if kind is GGUFValueType.ARRAY:
        cursor.fail(f"{shown} is an array of arrays, which no model needs")
    count = cursor.u64(shown)
    smallest = 8 if kind is GGUFValueType.STRING else _SCALARS[kind].itemsize
    if count > cursor.left // smallest:
        cursor.fail(f"{shown} claims {count} entries, more than the rest of the file can hold")
    cursor.array_entries += count
    if cursor.array_entries > MAX_ARRAY_ENTRIES:
        cursor.fail(f"{shown} brings its arrays to {cursor.array_entries} entries, above {MAX_ARRAY_ENTRIES}")
    if kind is GGUFValueType.STRING:
        return cursor.texts(count, shown)
    array = cursor.array(_SCALARS[kind], count, shown)
    if kind is GGUFValueType.BOOL:
        return [_as_bool(cursor, value, shown) for value in array.tolist()]
    values: list[int] | list[float] = array.tolist()
    return values


def _as_bool(cursor: Cursor, value: int | float, shown: str) -> bool:
    if value not in (0, 1):
        cursor.fail(f"{shown} holds {value} where a boolean, 0 or 1, belongs")
    return value == 1


def _alignment(cursor: Cursor, metadata: dict[str, Value]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    low, high = ALIGNMENT_RANGE
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high or value & (value - 1):
        cursor.fail(f"general.alignment is {str(value)[:40]}, not a power of two from {low} to {high}")
    return value


def _read_tensors(cursor: Cursor, count: int, alignment: int) -> dict[str, GGUFTensor]:
    infos: dict[str, tuple[GGMLQuantizationType, tuple[int, ...], int, int]] = {}
    for index in range(count):
        name = cursor.name(f"tensor {index}")
        if name in infos:
            cursor.fail(f"{_shown('tensor', name)} appears twice")
        infos[name] = _read_tensor_info(cursor, _shown("tensor", name), alignment)
    base = -(-cursor.position // alignment) * alignment
    spans: list[tuple[int, int, str]] = []
    tensors: dict[str, GGUFTensor] = {}
    for name, (kind, shape, offset, nbytes) in infos.items():
        start = base + offset
        if start + nbytes > len(cursor.buffer):
            cursor.fail(
                f"{_shown('tensor', name)} ends at byte {start + nbytes} of a file of {len(cursor.buffer)}, "
                "which is truncated or damaged"
            )
        spans.append((start, start + nbytes, name))
        tensors[name] = GGUFTensor(name, kind, shape, np.frombuffer(cursor.buffer, np.uint8, nbytes, start))
    spans.sort()
    for (_, end, first), (start, _, second) in itertools.pairwise(spans):
        if start < end:
            cursor.fail(f"{_shown('tensor', second)} overlaps {_shown('tensor', first)}")
    return tensors


def _read_tensor_info(
    cursor: Cursor, shown: str, alignment: int
) -> tuple[GGMLQuantizationType, tuple[int, ...], int, int]:
    """Type, shape (numpy order), offset into the data section, bytes."""
    n_dims = cursor.u32(shown)
    if not 1 <= n_dims <= MAX_DIMENSIONS:
        cursor.fail(f"{shown} has {n_dims} dimensions, not 1 to {MAX_DIMENSIONS}")
    shape = tuple(cursor.u64(shown) for _ in range(n_dims))[::-1]
    if 0 in shape:
        cursor.fail(f"{shown} has a dimension of zero")
    code = cursor.u32(shown)
    try:
        kind = GGMLQuantizationType(code)
    except ValueError:
        cursor.fail(f"{shown} has the unknown tensor type {code}")
    offset = cursor.u64(shown)
    if offset % alignment:
        cursor.fail(f"{shown} starts at offset {offset}, which is not a multiple of the alignment {alignment}")
    try:
        # Python integers do not wrap, so a huge product is simply larger than the file.
        nbytes = nbytes_of(kind, shape)
    except ValueError as error:
        cursor.fail(f"{shown}: {error}")
    return kind, shape, offset, nbytes


def _shown(what: str, name: str) -> str:
    """A name from outside, short and without control characters, for a message."""
    return f"{what} {name[:80]!r}" + ("..." if len(name) > 80 else "")


def _close(buffer: mmap.mmap) -> None:
    # BufferError: somebody still holds a tensor's view (or an error's traceback does); the map goes when the view goes.
    with contextlib.suppress(BufferError):
        buffer.close()
