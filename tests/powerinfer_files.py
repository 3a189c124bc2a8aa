"""Tiny files as PowerInfer's convert.py writes them: another magic, keys of 2023, predictors that no key tells of."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from factories import TinyPredictor

from turbosparse.model.gguf import GGUFFile

# The keys that convert.py writes, under the name of the architecture.
_KEYS = (
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "rope.dimension_count",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
)


def write_powerinfer(
    source: Path,
    out: Path,
    architecture: str,
    predictor: TinyPredictor,
    keys: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray | None] | None = None,
) -> Path:
    """Write the F32 file `source` of ours, without a predictor, as a file of PowerInfer.

    Args:
        source: of a llama or mistral model.
        out: to write.
        architecture: bamboo or llama.
        predictor: one for every layer, whose thresholds are not written; pass them in `keys`.
        keys: more of them, or others; None drops one.
        tensors: more of them, or others; None drops one.
    """
    with GGUFFile.open(source) as file:
        metadata = {f"{architecture}.{key}": file.metadata[f"turbosparse.{key}"] for key in _KEYS}
        metadata |= {key: value for key, value in file.metadata.items() if key.startswith("tokenizer.")}
        arrays: dict[str, np.ndarray | None] = {
            name: tensor.data.view(np.float32).reshape(tensor.shape).copy() for name, tensor in file.tensors.items()
        }
    arrays.setdefault("output.weight", arrays["token_embd.weight"])  # its program ties nothing
    for index, layer in enumerate(predictor.layers):
        assert layer is not None
        arrays |= {f"blk.{index}.fc1.weight": layer[0], f"blk.{index}.fc2.weight": layer[1]}
    writer = gguf.GGUFWriter(out, architecture)
    for key, value in (metadata | (keys or {})).items():
        if value is not None:
            kind = gguf.GGUFValueType.get_type(value)
            writer.add_key_value(key, value, gguf.GGUFValueType.UINT32 if kind is gguf.GGUFValueType.INT32 else kind)
    for name, array in (arrays | (tensors or {})).items():
        if array is not None:
            writer.add_tensor(name, np.ascontiguousarray(array, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with out.open("r+b") as stream:
        stream.write(struct.pack("<I", int.from_bytes(b"PWRI", "little")))
    return out
