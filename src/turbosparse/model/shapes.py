"""Shapes of well-known models, for models with random weights: what a Hugging Face config.json says of their sizes."""

from __future__ import annotations

from typing import Any

from turbosparse.errors import UserError
from turbosparse.model.config import ModelConfig

_SIZES = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
    "rope_theta",
    "tie_word_embeddings",
    "num_local_experts",
    "num_experts_per_tok",
)
_SHAPES: dict[str, tuple[Any, ...]] = {
    "smollm2-135m": ("llama", 30, 576, 1536, 9, 3, 49152, 8192, 100_000.0, True),
    "llama-3.2-1b": ("llama", 16, 2048, 8192, 32, 8, 128256, 131072, 500_000.0, True),
    "llama-3-8b": ("llama", 32, 4096, 14336, 32, 8, 128256, 8192, 500_000.0, False),
    "mistral-7b": ("mistral", 32, 4096, 14336, 32, 8, 32000, 32768, 1_000_000.0, False),
    "mixtral-47b": ("mixtral", 32, 4096, 14336, 32, 8, 32000, 32768, 1_000_000.0, False, 8, 2),
    "qwen2.5-0.5b": ("qwen2", 24, 896, 4864, 14, 2, 151936, 32768, 1_000_000.0, True),
    "qwen2.5-7b": ("qwen2", 28, 3584, 18944, 28, 4, 152064, 32768, 1_000_000.0, False),
}
SHAPES = tuple(_SHAPES)


def shape_config(
    shape: str, activation: str, layers: int | None = None, neurons_per_gate: int = 1, mirrored_ups: bool = False
) -> ModelConfig:
    """The config of a model of a well-known shape.

    Args:
        shape: one of `SHAPES`.
        activation: "drelu", or "swiglu" for its dense twin.
        layers: how many instead of the model's own.
        neurons_per_gate: of a dReLU model without experts; divides its neurons.
        mirrored_ups: of such a model, whose neurons_per_gate is even.

    Raises:
        UserError: the shape is not known, or its neurons cannot share gates or ups so.
    """
    if shape not in _SHAPES:
        raise UserError(f"--shape {shape[:40]}: choose one of {', '.join(SHAPES)}.")
    values = dict(zip(_SIZES, _SHAPES[shape], strict=False))  # the last two are of mixtures of experts
    values |= {"rms_norm_eps": 1e-5, "hidden_act": "silu", "sliding_window": None}
    if layers is not None:
        values["num_hidden_layers"] = layers
    if neurons_per_gate != 1 and activation != "drelu":
        raise UserError("--neurons-per-gate: neurons of a dense model do not share gates; leave it out.")
    if mirrored_ups and activation != "drelu":
        raise UserError("--mirrored-ups: neurons of a dense model do not share ups; leave it out.")
    if activation == "drelu":
        values |= {
            "model_type": f"turbosparse_{values['model_type']}",
            "activation": "drelu",
            "hidden_act": "drelu",
            "neurons_per_gate": neurons_per_gate,
            "mirrored_ups": mirrored_ups,
        }
    return ModelConfig.from_hf(values, f"the shape {shape}")
