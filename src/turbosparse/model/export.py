"""Write a Hugging Face folder as the one GGUF file that the engine runs (docs/format.md).

One tensor is in memory at a time. The file appears under its name only when it is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter

from turbosparse.errors import UserError
from turbosparse.model.checkpoint import CONFIG, Checkpoint, StoredTensor
from turbosparse.model.config import ModelConfig
from turbosparse.model.config_hf import text_config
from turbosparse.model.experts import stored_experts
from turbosparse.model.export_metadata import architecture_of, check_exportable, write_metadata, write_tokenizer
from turbosparse.model.families import FAMILIES
from turbosparse.model.gguf import nbytes_of
from turbosparse.model.gguf_parts import files_of
from turbosparse.model.layout import ROPE_FACTORS, TensorSpec, tensor_specs
from turbosparse.model.published import stored_predictor
from turbosparse.model.quantize import quantize, writable_type
from turbosparse.model.rope import frequency_factors, rope_from_hf
from turbosparse.model.tokenizer import tokenizer_metadata

Type = GGMLQuantizationType
Progress = Callable[[int, int], None]

# Matrices, and embeddings: every token reads one row of the embedding but the output projection reads all of it, and
# 4 bits there cost more quality than in any other matrix.
QUANTS: dict[str, tuple[Type, Type]] = {
    "q4_0": (Type.Q4_0, Type.Q8_0),
    "q8_0": (Type.Q8_0, Type.Q8_0),
    "f16": (Type.F16, Type.F16),
    "f32": (Type.F32, Type.F32),
}
_EMBEDDING = "embed_tokens.weight"
# What a folder may hold beyond the model: a buffer of old checkpoints, and the output projection though it is tied.
_SPARE = ("rotary_emb.inv_freq", "lm_head.weight")


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        path: the file.
        parameters: weights of the model, tied ones once.
        file_bytes: its size.
        quant: q4_0, q8_0, f16 or f32.
        architecture: its `general.architecture`.
    """

    path: Path
    parameters: int
    file_bytes: int
    quant: str
    architecture: str


def export_gguf(
    hf_dir: str | os.PathLike[str],
    out_path: str | os.PathLike[str],
    quant: str,
    progress: Progress | None = None,
    threshold: float | None = None,
) -> ExportReport:
    """Write the model of a Hugging Face folder as a GGUF file, replacing a file that is there.

    Args:
        hf_dir: a dense or sparse folder with safetensors and tokenizer.json.
        out_path: the file to write.
        quant: q4_0, q8_0, f16 or f32: the type of the matrices. Norms and biases stay F32; rows that are not whole
            blocks of 32 become F16.
        progress: called with (weights done, weights in all) after each tensor.
        threshold: of the predictors of a published folder; None: 0 (published.py).

    Raises:
        UserError: the folder is not a model that the engine runs, or the file cannot be written or is one of the
            folder's own. Nothing is left then, nor after an interrupt.
    """
    folder, out = Path(hf_dir), Path(out_path)
    refuse_own_file(folder, out)
    if quant not in QUANTS:
        raise UserError(f"--quant {quant[:40]}: choose one of {', '.join(QUANTS)}.")
    with Checkpoint.open(folder) as checkpoint:
        plan = _plan(checkpoint, threshold)
        tokenizer = tokenizer_metadata(folder)
        architecture = architecture_of(plan.config)
        with replacing(out) as partial:
            writer = GGUFWriter(partial, architecture)
            try:
                write_metadata(writer, plan.config, quant, folder, checkpoint.config)
                write_tokenizer(writer, tokenizer)
                _write_tensors(writer, plan, quant, progress)
            finally:
                writer.close()
            file_bytes = partial.stat().st_size
    return ExportReport(out, plan.parameters, file_bytes, quant, architecture)


@dataclass(frozen=True, eq=False)
class _Plan:
    """What there is to write: each tensor with where it comes from (the experts, one by one), and RoPE's divisors."""

    config: ModelConfig
    tensors: list[tuple[TensorSpec, list[StoredTensor]]]
    factors: npt.NDArray[np.float32] | None

    @property
    def parameters(self) -> int:
        return sum(math.prod(spec.shape) for spec, _ in self.tensors)


def _plan(checkpoint: Checkpoint, threshold: float | None) -> _Plan:
    """Find the tensors of the model in the checkpoint and check that they are all, and of the right shape."""
    source = str(checkpoint.folder / CONFIG)
    config = ModelConfig.from_hf(checkpoint.config, source)
    family = FAMILIES[config.family]
    text = {**family.hf_defaults, **text_config(checkpoint.config)}
    factors = frequency_factors(rope_from_hf(text, source, family.rope_theta_local), config.head_dim)
    check_exportable(config, source, factors is not None)
    prefix = _prefix(checkpoint)
    config = dataclasses.replace(config, predictor=stored_predictor(checkpoint, config, prefix, threshold))
    tensors: list[tuple[TensorSpec, list[StoredTensor]]] = []
    for spec in tensor_specs(config):
        parts = _stored(checkpoint, spec, prefix)
        matrix = spec.shape[-2:]
        shape = matrix[::-1] if spec.role == "down" and config.sparse else matrix
        for stored in parts:
            if stored.shape != shape:
                raise UserError(
                    f"{stored.file}: tensor {stored.name!r} has the shape {stored.shape}, but {CONFIG} says {shape}."
                )
        tensors.append((spec, parts))
    used = {stored.name for _, parts in tensors for stored in parts}
    for name, stored in checkpoint.tensors.items():
        # A part of the model that would silently be left out: a bias, a scale.
        if name.startswith(prefix) and name not in used and not name.endswith(_SPARE):
            raise UserError(f"{stored.file} has a tensor {name[:80]!r} that no known {config.family} model has.")
    return _Plan(config, tensors, factors)


def _prefix(checkpoint: Checkpoint) -> str:
    """What stands before the names of the text model: "model.", or more where a vision tower stands beside it."""
    found = [name for name in checkpoint.tensors if name == _EMBEDDING or name.endswith("." + _EMBEDDING)]
    if len(found) != 1:
        raise UserError(f"{checkpoint.folder} has {len(found)} tensors named {_EMBEDDING!r}; a model has one.")
    return found[0].removesuffix(_EMBEDDING)


def _stored(checkpoint: Checkpoint, spec: TensorSpec, prefix: str) -> list[StoredTensor]:
    """The tensor, or those of the experts."""
    if len(spec.shape) == 3:
        return stored_experts(checkpoint, spec, prefix)
    names = [prefix + spec.hf_name]
    if spec.hf_name == "lm_head.weight":
        # It stands beside the text model, not in it.
        names = [prefix.removesuffix("model.") + spec.hf_name, spec.hf_name]
    if spec.role == "router":
        # Where transformers writes what it has in memory, as it does for the experts (experts.py).
        names.append(f"{prefix}layers.{spec.name.split('.')[1]}.mlp.gate.weight")
    for name in names:
        if name in checkpoint.tensors:
            return [checkpoint.tensors[name]]
    raise UserError(f"{checkpoint.folder} has no tensor {names[0]!r}, which its {CONFIG} asks for.")


def _write_tensors(writer: GGUFWriter, plan: _Plan, quant: str, progress: Progress | None) -> None:
    if plan.factors is not None:
        writer.add_tensor_info(ROPE_FACTORS, plan.factors.shape, plan.factors.dtype, plan.factors.nbytes)
    kinds = [storage_type(spec, quant) for spec, _ in plan.tensors]
    for (spec, _), kind in zip(plan.tensors, kinds, strict=True):
        # A dtype other than uint8 says that the shape counts elements.
        writer.add_tensor_info(spec.name, spec.shape, np.dtype(np.float32), nbytes_of(kind, spec.shape), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if plan.factors is not None:
        writer.write_tensor_data(plan.factors)
    done, total = 0, plan.parameters
    for (spec, parts), kind in zip(plan.tensors, kinds, strict=True):
        encoded = (_encoded(stored, spec.role, plan.config, kind) for stored in parts)
        stream: Any = TensorStream(encoded, nbytes_of(kind, spec.shape))  # all that the writer asks of an array
        writer.write_tensor_data(stream)
        done += math.prod(spec.shape)
        if progress is not None:
            progress(done, total)


def _encoded(stored: StoredTensor, role: str, config: ModelConfig, kind: Type) -> npt.NDArray[np.uint8]:
    try:
        return quantize(to_gguf(stored.read(), role, config), kind)
    except ValueError as error:
        raise UserError(f"{stored.file}: tensor {stored.name!r} cannot be written ({error}).") from None


class TensorStream:
    """A tensor for `GGUFWriter.write_tensor_data` that is made in parts while it is written: `nbytes` bytes in all."""

    def __init__(self, parts: Iterable[npt.NDArray[Any]], nbytes: int) -> None:
        self._parts, self.nbytes = parts, nbytes

    def tofile(self, file: BufferedWriter) -> None:
        written = 0
        for part in self._parts:
            part.tofile(file)
            written += part.nbytes
        assert written == self.nbytes


def storage_type(spec: TensorSpec, quant: str) -> Type:
    """How a tensor is stored in a file of `quant`, a key of `QUANTS`."""
    if spec.role in ("norm", "bias", "router") or len(spec.shape) == 1:
        return Type.F32
    matrix, embedding = QUANTS[quant]
    return writable_type(embedding if spec.role == "embedding" else matrix, spec.shape[-1])


def to_gguf(values: npt.NDArray[np.float32], role: str, config: ModelConfig) -> npt.NDArray[np.float32]:
    """A Hugging Face tensor as GGUF holds it, float32.

    Args:
        values: the tensor, [rows] or [rows, columns].
        role: `TensorSpec.role`.
        config: of the model.
    """
    if role == "norm" and FAMILIES[config.family].norm_offset:
        return values + np.float32(1.0)
    if role in ("q", "k") and config.rope_interleaved:
        return _interleaved(values, config.head_dim)
    if role == "down" and config.sparse:
        return np.ascontiguousarray(values.T)
    return values


def _interleaved(values: npt.NDArray[np.float32], head_dim: int) -> npt.NDArray[np.float32]:
    """Reorder the rows of each head so that the two that RoPE rotates together, i and i + head_dim/2, meet."""
    halves = values.reshape(-1, 2, head_dim // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def refuse_own_file(source: Path, out: Path) -> None:
    """Keep an export from replacing what it reads; GGUF files that lie in the folder are not read.

    Raises:
        UserError: `out` is `source`, a part of it, or a file in it.
    """
    read = [file for file in source.iterdir() if file.suffix != ".gguf"] if source.is_dir() else files_of(source)
    if out.is_file() and any(file.is_file() and file.samefile(out) for file in read):
        raise UserError(f"{out} belongs to the model that is read; give the path of another file to write.")


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A temporary path beside `out` that becomes `out` if the block succeeds and vanishes if it does not."""
    if out.is_dir():
        raise UserError(f"{out} is a folder; give the path of the file to write.")
    if out.exists() and not out.is_file():
        raise UserError(f"{out} is a device or pipe; give the path of the file to write.")
    if not out.parent.is_dir():
        raise UserError(f"{out}: the folder {out.parent} does not exist; create it first.")
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, out)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror or error}); choose another place.") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
