"""Read the weights of a Hugging Face folder, trusting none of its files, without torch.

Weights come from safetensors only: pickles run code. The files are mapped and decoded tensor by tensor, so a model of
any size needs the memory of its largest tensor.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import mmap
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from turbosparse.errors import UserError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# The format's own limit on a header, which the index and the config get too.
MAX_JSON_BYTES = 100_000_000
MAX_DIMENSIONS = 8
MAX_SHARDS = 4096
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """One tensor of a checkpoint.

    Attributes:
        name: in the file.
        dtype: safetensors' name of its element type; those that `read` decodes are F32, F16 and BF16.
        shape: numpy order.
        file: where it lies.
        data: flat read-only uint8 view into the mapped file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    data: npt.NDArray[np.uint8]

    def read(self) -> npt.NDArray[np.float32]:
        """Decode it: a new float32 array of its shape.

        Raises:
            UserError: its elements are not F32, F16 or BF16.
        """
        # A copy first: in a file, a tensor may start at any byte.
        raw = self.data.tobytes()
        if self.dtype == "F32":
            values = np.frombuffer(raw, "<f4").astype(np.float32)
        elif self.dtype == "F16":
            values = np.frombuffer(raw, "<f2").astype(np.float32)
        elif self.dtype == "BF16":
            # bfloat16 is the upper half of a float32.
            values = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            raise UserError(f"{self.file}: tensor {self.name[:80]!r} is {self.dtype}; F32, F16 and BF16 are read.")
        return values.reshape(self.shape)


class Checkpoint:
    """A Hugging Face folder with its weights mapped. Use as a context manager, or call `close`.

    Attributes:
        folder: where it lies.
        config: the parsed config.json.
        tensors: name to `StoredTensor`, of all shards.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: dict[str, StoredTensor]

    def __init__(self, folder: Path) -> None:
        """Map a folder; use `open`."""
        self.folder = folder
        self.config = read_config(folder)
        self.tensors = {}
        self._maps: list[mmap.mmap] = []
        try:
            for file, names in _weight_files(folder).items():
                self._add(file, names)
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Checkpoint:
        """Map the weights of `folder` and check the headers of all its files.

        Raises:
            UserError: the folder has no config or no safetensors, or a file cannot be what it claims.
        """
        return cls(Path(folder))

    def close(self) -> None:
        """Drop the tensors and unmap the files."""
        self.tensors = {}
        for buffer in self._maps:
            # BufferError: somebody holds a view; the map goes when the view goes.
            with contextlib.suppress(BufferError):
                buffer.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _add(self, file: Path, names: frozenset[str] | None) -> None:
        """Map one file; `names` are the tensors that the index promises in it."""
        buffer = _map(file)
        self._maps.append(buffer)
        found = _read_tensors(file, buffer)
        if names is not None and names - found.keys():
            missing = min(names - found.keys())
            raise UserError(f"{file} has no tensor {missing[:80]!r}, which {INDEX} promises; download it again.")
        for name, tensor in found.items():
            if name in self.tensors:
                raise UserError(f"{file} has the tensor {name[:80]!r}, which {self.tensors[name].file.name} has too.")
            self.tensors[name] = tensor


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder.

    Raises:
        UserError: no such folder, no such file, or it is not a JSON object.
    """
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {what}; give the folder of a Hugging Face checkpoint.")
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} has no {CONFIG}; give the folder of a Hugging Face checkpoint.")
    return _read_json(folder / CONFIG)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{file} is larger than {MAX_JSON_BYTES} bytes, which no such file is.")
        return _parse_object(file.read_bytes(), str(file))
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); check its permissions.") from None


def _parse_object(text: bytes, source: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = dict(pairs)
        if len(keys) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise UserError(f"{source} has the key {twice[:80]!r} twice; the file is damaged.")
        return keys

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError):
        raise UserError(f"{source} is not JSON; download it again.") from None
    if not isinstance(value, dict):
        raise UserError(f"{source} is not a JSON object; download it again.")
    return value


def _weight_files(folder: Path) -> dict[Path, frozenset[str] | None]:
    """The files of the weights and, where an index says so, the tensors of each."""
    if (folder / WEIGHTS).exists():
        return {folder / WEIGHTS: None}
    if (folder / INDEX).is_file():
        return _shards(folder)
    single = list(folder.glob("*.safetensors"))
    if len(single) == 1:
        return {single[0]: None}
    if single:
        raise UserError(f"{folder} has {len(single)} .safetensors files but no {INDEX}; download the folder again.")
    if any(any(folder.glob(pattern)) for pattern in _PICKLES):
        raise UserError(f"{folder} has its weights as a pickle only, which is never loaded; save them as safetensors.")
    raise UserError(f"{folder} has no {WEIGHTS}; give the folder of a Hugging Face checkpoint.")


def _shards(folder: Path) -> dict[Path, frozenset[str] | None]:
    index = folder / INDEX
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map from tensors to files; download it again.")
    names: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        # A name only: an index must not reach out of its folder.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors") or "\0" in file:
            raise UserError(f"{index} places a tensor in {str(file)[:80]!r}, which is no .safetensors file beside it.")
        names.setdefault(file, set()).add(tensor)
    if len(names) > MAX_SHARDS:
        raise UserError(f"{index} names {len(names)} files, more than {MAX_SHARDS}.")
    for file in names:
        if not (folder / file).is_file():
            raise UserError(f"{folder} lacks {file}, which {INDEX} names; download the folder again.")
    return {folder / file: frozenset(tensors) for file, tensors in names.items()}


def _map(file: Path) -> mmap.mmap:
    try:
        with file.open("rb") as handle:
            status = os.fstat(handle.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"{file} is not a regular file; download it again.")
            if status.st_size == 0:
                raise UserError(f"{file} is empty; download it again.")
            return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); check the checkpoint.") from None


def _read_tensors(file: Path, buffer: mmap.mmap) -> dict[str, StoredTensor]:
    size = len(buffer)
    header_bytes = int.from_bytes(buffer[:8], "little")
    if size < 8 or header_bytes > min(MAX_JSON_BYTES, size - 8):
        raise UserError(f"{file} is not a safetensors file, or truncated: its header does not fit into {size} bytes.")
    base = 8 + header_bytes
    header = _parse_object(buffer[8:base], f"{file}: the header")
    header.pop("__metadata__", None)
    tensors: dict[str, StoredTensor] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        dtype, shape, start, end = _checked_entry(file, name, entry)
        if end > size - base:
            raise UserError(
                f"{file}: tensor {name[:80]!r} ends at byte {base + end} of {size}; the file is truncated or damaged."
            )
        if start < end:  # an empty tensor overlaps nothing
            spans.append((start, end, name))
        tensors[name] = StoredTensor(
            name, dtype, shape, file, np.frombuffer(buffer, np.uint8, end - start, base + start)
        )
    spans.sort()
    for (_, end, first), (start, _, second) in itertools.pairwise(spans):
        if start < end:
            raise UserError(f"{file}: tensor {second[:80]!r} overlaps {first[:80]!r}; the file is damaged.")
    return tensors


def _checked_entry(file: Path, name: str, entry: object) -> tuple[str, tuple[int, ...], int, int]:
    """Dtype, shape, first byte and end of a tensor, whose bytes are as many as dtype and shape say."""
    shown = f"{file}: tensor {name[:80]!r}"
    if not isinstance(entry, dict):
        raise UserError(f"{shown} has no description; the file is damaged.")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise UserError(f"{shown} has the unknown element type {str(dtype)[:40]!r}; F32, F16 and BF16 are read.")
    if not _counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise UserError(f"{shown} has the shape {str(shape)[:60]}, which is not a list of sizes.")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise UserError(f"{shown} has the offsets {str(offsets)[:60]}, which are not a first byte and an end.")
    needed = math.prod(shape) * _ITEM_BYTES[dtype]
    if needed != offsets[1] - offsets[0]:
        raise UserError(f"{shown} has {offsets[1] - offsets[0]} bytes where {dtype} of shape {shape} takes {needed}.")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 62 for item in value)
