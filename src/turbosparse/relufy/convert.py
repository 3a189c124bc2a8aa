"""The swap: a dense checkpoint in, the same weights under a sparse activation out.

No weight changes. A sparse folder is the dense one with another config (drelu.py says what stands in it), so converting
costs a copy; what makes the model good again is training.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from turbosparse.errors import UserError, reason
from turbosparse.folders import CONFIG
from turbosparse.model.provenance import LICENCE_NAME, README, Provenance, note_provenance, provenance
from turbosparse.relufy.drelu import ACTIVATIONS, FAMILIES, check_dense
from turbosparse.relufy.source import check_checkpoint, check_source
from turbosparse.relufy.unpack import unpack

KEEP = "keep"
# What makes up a checkpoint. Pickles are not on the list, nor is code that a folder brings along.
_KEPT = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*")


def convert(source: str | Path, out: Path, activation: str = "drelu") -> dict[str, Any]:
    """Write `source` as a Hugging Face folder whose FFNs compute `activation`.

    Args:
        source: a Hugging Face folder, a hub id or a GGUF file of a dense model.
        out: the folder to write; must not exist.
        activation: "drelu", "reglu", or "keep" to rewrite a GGUF file or hub model as a folder: a dense one for a
            control, a sparse GGUF file to train it further.

    Returns:
        {"output", "architecture" (the model type written), "activation", "layers", "parameters"}.

    Raises:
        UserError: the source cannot be read, is no dense model of a supported family, or `out` exists.
    """
    if activation not in (*ACTIVATIONS, KEEP):
        raise UserError(f"--activation {activation}: choose one of {', '.join((*ACTIVATIONS, KEEP))}.")
    check_source(str(source), out, keep=activation == KEEP)
    with _new_folder(out) as partial:
        origin = _write_checkpoint(str(source), partial, keep=activation == KEEP)
        config = _checked_config(str(source), partial, keep=activation == KEEP)
        parameters = _checked_weights(str(source), partial, config.num_hidden_layers)
        if activation != KEEP:
            config = _swap(config, activation, partial)
        made = "as it is" if activation == KEEP else f"with {activation} in its feed-forward blocks, not trained yet"
        note_provenance(partial, origin, f"{Path(source).name} {made}: written by `turbosparse convert`.")
    return {
        "output": str(out),
        "architecture": config.model_type,
        "activation": activation if activation != KEEP else config.to_dict().get("hidden_act", "dense"),
        "layers": config.num_hidden_layers,
        "parameters": parameters,
    }


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` if the block succeeds and vanishes if it does not."""
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        os.replace(partial, out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error}); choose another folder.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_checkpoint(source: str, folder: Path, keep: bool) -> Provenance:
    """Write the checkpoint without what its card says; returns what of that goes on."""
    path = Path(source)
    if path.is_dir():
        _copy_checkpoint(path, folder)
        return provenance(path)
    if path.is_file():
        return _read_gguf(path, folder, keep)
    snapshot = _download(source)
    _copy_checkpoint(snapshot, folder)
    return Provenance(provenance(snapshot).license, source)


def _copy_checkpoint(source: Path, folder: Path) -> None:
    for file in sorted({file for pattern in _KEPT for file in source.glob(pattern) if file.is_file()}):
        shutil.copyfile(file, folder / file.name)


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=[*_KEPT, README]))
    except Exception as error:  # the hub's client raises errors of many kinds: offline, unknown, gated, disk full
        raise UserError(
            f"{hub_id}: cannot be downloaded ({reason(error)}); check the name and the connection."
        ) from None


def _read_gguf(path: Path, folder: Path, keep: bool) -> Provenance:
    """Dequantise a GGUF file to float32; the tokenizer is ours, as that of transformers is another."""
    from turbosparse.model.config import ModelConfig
    from turbosparse.model.gguf import GGUFFile
    from turbosparse.model.tokenizer import Tokenizer

    with GGUFFile.open(path) as file:  # bounds everything before a less careful reader sees the file
        config = ModelConfig.from_gguf(file)
        tokenizer = Tokenizer.from_gguf(file)
        licence = file.metadata.get("general.license")
        if config.experts > 0:
            raise UserError(f"{path}: is a mixture of experts; only models with one FFN a layer are converted.")
        if config.sparse and not keep:
            raise UserError(
                f"{path}: is a {config.activation} model already; convert the dense one, or make a folder of this one "
                f"with --activation {KEEP}."
            )
        if config.sparse:
            unpack(file, config, folder)
    if not config.sparse:
        _read_dense_gguf(path, folder)
    tokenizer.save_hf(folder)
    return Provenance(licence if isinstance(licence, str) and LICENCE_NAME.fullmatch(licence) else None)


def _read_dense_gguf(path: Path, folder: Path) -> None:
    """Dequantise through transformers."""
    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    except (ValueError, KeyError, NotImplementedError, OSError) as error:
        raise UserError(
            f"{path}: transformers cannot read it ({reason(error)}); use the Hugging Face folder."
        ) from None
    model.hf_quantizer = None  # the weights are plain by now; with a quantizer transformers refuses to save them
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)


def _checked_config(source: str, folder: Path, keep: bool) -> Any:
    """The config of a model of a supported family, dense unless it is kept as it is."""
    sparse = check_checkpoint(folder, source, keep)
    try:
        config = AutoConfig.from_pretrained(folder)
        if not sparse:
            check_dense(config)
    except Exception as error:  # impossible values make the library raise many kinds
        raise UserError(f"{source}: {CONFIG} cannot be used ({reason(error)}).") from None
    return config


def _checked_weights(source: str, folder: Path, layers: int) -> int:
    """Check that every layer has the three matrices of a gated FFN; returns the number of parameters stored."""
    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy") as tensors:
                shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{source}: {file.name} is damaged ({error}); fetch it again.") from None
    for layer in range(layers):
        for name in ("gate_proj", "up_proj", "down_proj"):
            tensor = f"model.layers.{layer}.mlp.{name}.weight"
            if tensor not in shapes:
                raise UserError(f"{source}: has no tensor {tensor!r}; only gated FFNs (SwiGLU, GeGLU) are converted.")
    total = 0
    for shape in shapes.values():
        count = 1
        for size in shape:
            count *= size
        total += count
    return total


def _swap(config: Any, activation: str, folder: Path) -> Any:
    """Replace the dense config of `folder` by that of the family's sparse form."""
    config_class, model_class = FAMILIES[config.model_type]
    values = config.to_dict()
    for key in ("model_type", "architectures", "auto_map", "transformers_version", config_class.activation_key):
        values.pop(key, None)
    sparse = config_class(activation=activation, **values)
    sparse.architectures = [model_class.__name__]
    sparse.save_pretrained(folder)
    return sparse
