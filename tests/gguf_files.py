"""Copies of GGUF files with something changed in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from turbosparse.model.gguf import GGUFFile

Kind = gguf.GGUFValueType
F32 = gguf.GGMLQuantizationType.F32


def _add_keys(writer: gguf.GGUFWriter, metadata: Mapping[str, Any]) -> None:
    """Counts are uint32, as the export writes them, where they can be."""
    for key, value in metadata.items():
        kind = Kind.get_type(value)
        if kind is Kind.INT32 and value >= 0:
            kind = Kind.UINT32 if value < 1 << 32 else Kind.UINT64
        writer.add_key_value(key, value, kind)


def copy_metadata(file: GGUFFile, writer: gguf.GGUFWriter) -> None:
    """Give a writer of the same architecture the keys of a file."""
    _add_keys(writer, {key: value for key, value in file.metadata.items() if key != "general.architecture"})


def edit_gguf(
    source: Path,
    out: Path,
    keys: Mapping[str, Any] | None = None,
    drop: Iterable[str] = (),
    tensors: Mapping[str, np.ndarray] | None = None,
    **split: Any,
) -> Path:
    """Write `source` again as `out` and return that.

    Args:
        source, out: files.
        keys: other values of keys; None drops one.
        drop: tensors to leave out.
        tensors: float32 tensors, new ones or instead of those of that name.
        split: options of GGUFWriter that make several files of it, whose names begin with that of `out`.
    """
    with GGUFFile.open(source) as file:
        metadata = dict(file.metadata) | dict(keys or {})
        arrays = {name: (tensor.type, tensor.shape, tensor.data.copy()) for name, tensor in file.tensors.items()}
    for name in drop:
        del arrays[name]
    arrays |= {name: (F32, array.shape, array.view(np.uint8)) for name, array in (tensors or {}).items()}
    writer = gguf.GGUFWriter(out, str(metadata.pop("general.architecture")), **split)
    _add_keys(writer, {key: value for key, value in metadata.items() if value is not None})
    for name, (kind, shape, data) in arrays.items():
        writer.add_tensor(name, data.reshape(*shape[:-1], -1), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
