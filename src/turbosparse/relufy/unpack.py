"""A sparse GGUF file as the Hugging Face folder that it was exported from, so that its training can go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from turbosparse.errors import UserError
from turbosparse.model.config import ModelConfig
from turbosparse.model.gguf import GGUFFile
from turbosparse.model.layout import ROPE_FACTORS, tensor_specs
from turbosparse.model.quantize import dequantize
from turbosparse.relufy.drelu import FAMILIES

_SPECIAL = ("bos", "eos")


def unpack(file: GGUFFile, config: ModelConfig, folder: Path) -> None:
    """Write the model of a sparse file, dequantised to float32, and its config; predictors are left out.

    Args:
        file: open and checked.
        config: its config.
        folder: exists.

    Raises:
        UserError: the model has what a folder of its family does not state.
    """
    config_class, model_class = FAMILIES[_folder_family(file, config)]
    described = config_class(**_values(file, config))
    described.architectures = [model_class.__name__]
    model = model_class(described)
    weights = {}
    for spec in tensor_specs(config):
        if spec.role != "predictor":
            tensor = file.tensors[spec.name]
            values = from_gguf(dequantize(tensor.data, tensor.type, tensor.shape), spec.role, config)
            name = spec.hf_name if spec.hf_name.startswith("lm_head") else f"model.{spec.hf_name}"
            weights[name] = torch.from_numpy(values)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)  # which is tied
    model.save_pretrained(folder)


def from_gguf(values: npt.NDArray[np.float32], role: str, config: ModelConfig) -> npt.NDArray[np.float32]:
    """A tensor of a sparse GGUF file as Hugging Face holds it: the way back of export.to_gguf."""
    if role in ("q", "k") and config.rope_interleaved:
        pairs = values.reshape(-1, config.head_dim // 2, 2, *values.shape[1:])
        values = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
    elif role == "down":
        values = np.ascontiguousarray(values.T)
    return values


def _folder_family(file: GGUFFile, config: ModelConfig) -> str:
    """The key of `FAMILIES`."""
    unstated = {
        "its norms after attention and FFN": config.post_norms,
        "the divisors of its rotary frequencies": ROPE_FACTORS in file.tensors,
        "its gate's threshold": config.gate_threshold != 0,
        "its sliding window in some layers": config.sliding_window is not None and config.family != "mistral",
    }
    for what, there in unstated.items():
        if there:
            raise UserError(f"{file.path}: {what} cannot be written into a folder yet; use the one it was made from.")
    return config.family


def _values(file: GGUFFile, config: ModelConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scale != 1:
        rope |= {"rope_type": "linear", "factor": config.rope_scale}
    values: dict[str, Any] = {
        "activation": config.activation,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "neurons_per_gate": config.neurons_per_gate,
        "mirrored_ups": config.mirrored_ups,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tied_embeddings,
    }
    if config.activation_thresholds is not None:
        values["activation_threshold"] = list(config.activation_thresholds)
    if config.family == "mistral":
        values["sliding_window"] = config.sliding_window
    for token in _SPECIAL:
        number = file.metadata.get(f"tokenizer.ggml.{token}_token_id")
        values[f"{token}_token_id"] = number if isinstance(number, int) else None
    return values
