"""Experts in a Hugging Face folder: a tensor each, or all of a layer in one, as transformers holds them in memory."""

from __future__ import annotations

import dataclasses

from turbosparse.errors import UserError
from turbosparse.model.checkpoint import CONFIG, Checkpoint, StoredTensor
from turbosparse.model.layout import TensorSpec


def stored_experts(checkpoint: Checkpoint, spec: TensorSpec, prefix: str) -> list[StoredTensor]:
    """The matrices of a layer's experts, in their order; their shapes are not checked.

    Args:
        checkpoint: the folder.
        spec: of the tensor [experts, rows, columns] that they become.
        prefix: of the text model's tensors.

    Raises:
        UserError: one of them is missing, or the tensor of all has another shape than the config says.
    """
    names = [prefix + spec.hf_name.replace("*", str(expert)) for expert in range(spec.shape[0])]
    fused = _fused(checkpoint, spec, prefix) if names[0] not in checkpoint.tensors else None
    if fused is not None:
        return fused
    for name in names:
        if name not in checkpoint.tensors:
            raise UserError(f"{checkpoint.folder} has no tensor {name!r}, which its {CONFIG} asks for.")
    return [checkpoint.tensors[name] for name in names]


def _fused(checkpoint: Checkpoint, spec: TensorSpec, prefix: str) -> list[StoredTensor] | None:
    """The same from `gate_up_proj` [experts, 2 ffn, hidden] or `down_proj` [experts, hidden, ffn], if it is there."""
    layer, part = spec.hf_name.split(".")[1], spec.name.split(".")[2].removesuffix("_exps")
    half = {"ffn_gate": 0, "ffn_up": 1}.get(part)
    name = f"{prefix}layers.{layer}.mlp.experts.{'down_proj' if half is None else 'gate_up_proj'}"
    stored = checkpoint.tensors.get(name)
    if stored is None or spec.role == "predictor":
        return None
    halves = 1 if half is None else 2
    experts = spec.shape[0]
    if len(stored.shape) != 3 or stored.shape[0] != experts or stored.shape[1] % halves:
        raise UserError(f"{stored.file}: tensor {name!r} has the shape {stored.shape}, not that of {experts} experts.")
    shape = (stored.shape[1] // halves, stored.shape[2])
    pieces = stored.data.reshape(experts * halves, -1)[half or 0 :: halves]
    return [dataclasses.replace(stored, shape=shape, data=piece) for piece in pieces]
