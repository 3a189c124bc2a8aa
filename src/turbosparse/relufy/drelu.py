# SPDX-License-Identifier: Apache-2.0
"""Transformers models whose feed-forward blocks are sparse: the reference that every other implementation is held to.

    dReLU   h = relu(gate) * relu(up)      Turbo Sparse, arXiv 2406.05955
    ReGLU   h = relu(gate) * up            GLU Variants Improve Transformer, arXiv 2002.05202
            y = h @ W_down.T               gate = x @ W_gate.T, up = x @ W_up.T, plus biases where the family has them

A gate may serve several neurons, each with an up of its own: as many as the config's `neurons_per_gate` says. These
stand next to each other, and gate_proj has a row for every such group. Ups may be mirrored too (`mirrored_ups`): two
neighbours under one gate share a row of up_proj, which the second one takes with the other sign, so that of an open
gate one of them fires, whatever the up.

A model may also have an activation threshold in each layer: an h that is smaller becomes zero (a dead zone, which
ProSparse, arXiv 2402.13516, adds to ReLU after training; here it can be trained with, see threshold.py).

Every folder with such a model holds a copy of this file, `modeling_turbosparse.py`, named in its `auto_map`; so it
needs torch and transformers and nothing else.

A model keeps everything of its family but the activation. Taken for its family it would run, and talk nonsense. So its
`model_type` is its own, and what stands in its config where the family names an activation is no activation that
transformers knows: a class of the family cannot load it by accident.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

CODE_FILE = "modeling_turbosparse.py"


def drelu(gate: Tensor, up: Tensor) -> Tensor:
    """relu(gate) * relu(up): a neuron fires where both are positive. Pre-activations of one shape, any float dtype."""
    return torch.relu(gate) * torch.relu(up)


def reglu(gate: Tensor, up: Tensor) -> Tensor:
    """relu(gate) * up: a neuron fires where its gate is positive. Pre-activations of one shape, any float dtype."""
    return torch.relu(gate) * up


def mirrored(up: Tensor) -> Tensor:
    """Ups as two neurons each share them, one with the other sign, side by side: [..., u] to [..., 2 u], any dtype."""
    return torch.stack([up, -up], dim=-1).flatten(-2)


ACTIVATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"drelu": drelu, "reglu": reglu}
DENSE_ACTIVATIONS = ("silu", "gelu_pytorch_tanh", "gelu", "relu")


class SparseGLU(nn.Module):
    """The feed-forward block down(activation(gate(x), up(x))), with the projections of the dense block it replaces.

    Attributes:
        gate_proj, up_proj: d to f; down_proj: f to d. Names and shapes are the family's, so state dicts match; where a
            gate serves several neurons, gate_proj is d to f over that number.
        neurons_per_gate: that number, 1 or more.
        mirrored_ups: up_proj is d to f / 2; neurons 2 j and 2 j + 1 have its row j, the second one with the other sign.
        activation: "drelu" or "reglu".
        threshold: a float32 scalar; a smaller |h| becomes zero; None: there is none. A tensor, so that all layers
            of a compiled model share one graph; no buffer, as the config holds it and from_pretrained would empty it.
        tap: if set, called with (gate, up, h), pre-activations and activation, each [..., f], of every forward pass.
    """

    threshold: Tensor | None

    def __init__(
        self,
        gate_proj: nn.Module,
        up_proj: nn.Module,
        down_proj: nn.Module,
        activation: str,
        threshold: float | None = None,
        neurons_per_gate: int = 1,
        mirrored_ups: bool = False,
    ) -> None:
        super().__init__()
        self.gate_proj = gate_proj
        self.up_proj = up_proj
        self.down_proj = down_proj
        self.activation = activation
        self.neurons_per_gate = neurons_per_gate
        self.mirrored_ups = mirrored_ups
        self.tap: Callable[[Tensor, Tensor, Tensor], None] | None = None
        self._combine = ACTIVATIONS[activation]
        self.set_threshold(threshold)

    def set_threshold(self, threshold: float | None) -> None:
        """Change the threshold of this layer; the config of the model must come to say the same."""
        self._stated = threshold
        device = next(self.down_proj.parameters()).device
        # A model that is still built without memory gets a number of its own all the same.
        here = torch.device("cpu") if device.type == "meta" else device
        self.threshold = None if threshold is None else torch.tensor(threshold, dtype=torch.float32, device=here)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseGLU:
        super()._apply(fn, recurse)
        self.set_threshold(self._stated)  # follows the weights to their device, not to their dtype
        return self

    def gates(self, x: Tensor) -> Tensor:
        """The gate of every neuron, before its relu: x [..., d] to [..., f]."""
        gate: Tensor = self.gate_proj(x)
        if self.neurons_per_gate == 1:
            return gate
        return gate.unsqueeze(-1).expand(*gate.shape, self.neurons_per_gate).flatten(-2)

    def ups(self, x: Tensor) -> Tensor:
        """The up of every neuron, before its relu: x [..., d] to [..., f]."""
        up: Tensor = self.up_proj(x)
        return mirrored(up) if self.mirrored_ups else up

    def hidden(self, gate: Tensor, up: Tensor) -> Tensor:
        """The activation, [..., f], of pre-activations of that shape; below the threshold it is zero."""
        h = self._combine(gate, up)
        return h if self.threshold is None else torch.where(h.abs() < self.threshold, 0.0, h)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., d] to [..., d]."""
        gate, up = self.gates(x), self.ups(x)
        h = self.hidden(gate, up)
        if self.tap is not None:
            self.tap(gate, up, h)
        y: Tensor = self.down_proj(h)
        return y

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


class _SparseConfig:
    """What the config of a sparse model adds to its family's; comes first in its bases.

    `activation` is required and stands a second time under the family's own key. They must agree: an edit that touches
    one of them is an error, not another model. `activation_threshold`, if the model has it, is one number per layer.
    `neurons_per_gate` divides `intermediate_size`, which counts neurons; with `mirrored_ups` it is even.
    """

    activation: str
    activation_threshold: list[float] | None
    neurons_per_gate: int
    mirrored_ups: bool
    activation_key: ClassVar[str] = "hidden_act"
    has_no_defaults_at_init: ClassVar[bool] = True  # a config without `activation` is an error even as a default

    def __post_init__(self, **kwargs: Any) -> None:
        self.activation = kwargs.pop("activation", None)
        self.activation_threshold = kwargs.pop("activation_threshold", None)
        self.neurons_per_gate = kwargs.pop("neurons_per_gate", 1)
        self.mirrored_ups = kwargs.pop("mirrored_ups", False)
        if getattr(self, self.activation_key) == "":
            setattr(self, self.activation_key, self.activation)
        self.checked_activation()
        self.layer_thresholds()
        self.gate_rows()
        self.up_rows()
        super().__post_init__(**kwargs)  # type: ignore[misc]
        family = type(self).__name__.removesuffix("Config")
        module = Path(CODE_FILE).stem
        self.auto_map = {
            "AutoConfig": f"{module}.{family}Config",
            "AutoModelForCausalLM": f"{module}.{family}ForCausalLM",
        }

    def checked_activation(self) -> str:
        """The activation.

        Raises:
            ValueError: it is missing, unknown, or not what the family's key says.
        """
        for key in ("activation", self.activation_key):
            value = getattr(self, key)
            if value not in ACTIVATIONS or value != self.activation:
                raise ValueError(
                    f"config.json of a {type(self).model_type} model must name the activation it was made with, one of "  # type: ignore[attr-defined]
                    f"{', '.join(ACTIVATIONS)}, under `activation` and `{self.activation_key}`; "
                    f"`{key}` is {value!r}"
                )
        return self.activation

    def gate_rows(self) -> int:
        """Rows of gate_proj: one for every group of neurons that share a gate.

        Raises:
            ValueError: `neurons_per_gate` is no whole number >= 1 that divides `intermediate_size`.
        """
        neurons, group = self.intermediate_size, self.neurons_per_gate  # type: ignore[attr-defined]
        if type(group) is not int or group < 1 or neurons % group:
            raise ValueError(f"`neurons_per_gate` must be a whole number >= 1 that divides {neurons}, not {group!r}")
        return int(neurons) // group

    def up_rows(self) -> int:
        """Rows of up_proj: one for every neuron, or for two of them.

        Raises:
            ValueError: `mirrored_ups` is not true or false, or is true where neurons do not share gates in pairs, or
                are those of ReGLU, which fire for either sign.
        """
        if type(self.mirrored_ups) is not bool:
            raise ValueError(f"`mirrored_ups` must be true or false, not {self.mirrored_ups!r}")
        if not self.mirrored_ups:
            return int(self.intermediate_size)  # type: ignore[attr-defined]
        if self.neurons_per_gate % 2 or self.activation != "drelu":
            raise ValueError("`mirrored_ups` needs dReLU and an even `neurons_per_gate`")
        return int(self.intermediate_size) // 2  # type: ignore[attr-defined]

    def layer_thresholds(self) -> list[float] | list[None]:
        """The activation threshold of every layer, or as many None.

        Raises:
            ValueError: `activation_threshold` is not one finite number >= 0 per layer.
        """
        layers: int = self.num_hidden_layers  # type: ignore[attr-defined]
        values = self.activation_threshold
        if values is None:
            return [None] * layers
        if len(values) != layers or not all(0 <= value < float("inf") for value in values):
            raise ValueError(f"`activation_threshold` must be {layers} finite numbers >= 0, one per layer")
        return values

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save the config and, beside it, this file: the code that `auto_map` names."""
        code = Path(__file__).read_bytes()
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        Path(save_directory, CODE_FILE).write_bytes(code)


def _with_rows(projection: nn.Linear, rows: int) -> nn.Linear:
    """The projection, or a new one like it where it has another number of rows."""
    if projection.out_features == rows:
        return projection
    weight, biased = projection.weight, projection.bias is not None
    return nn.Linear(projection.in_features, rows, biased, device=weight.device, dtype=weight.dtype)


class _SparseModel:
    """What a sparse model does to its family's: every `layer.mlp` is a SparseGLU; comes first in its bases."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        activation = config.checked_activation()
        # The family builds dense blocks, whose projections are kept. Its layers share the config object, so the name
        # that it does not know is hidden for that long instead of handing over a copy.
        setattr(config, config.activation_key, "relu")
        try:
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        finally:
            setattr(config, config.activation_key, activation)
        for layer, threshold in zip(self.model.layers, config.layer_thresholds(), strict=True):  # type: ignore[attr-defined]
            dense = layer.mlp
            layer.mlp = SparseGLU(
                _with_rows(dense.gate_proj, config.gate_rows()),
                _with_rows(dense.up_proj, config.up_rows()),
                dense.down_proj,
                activation,
                threshold,
                config.neurons_per_gate,
                config.mirrored_ups,
            )


class TurboSparseLlamaConfig(_SparseConfig, LlamaConfig):
    model_type = "turbosparse_llama"
    hidden_act: str = ""


class TurboSparseLlamaForCausalLM(_SparseModel, LlamaForCausalLM):
    config_class = TurboSparseLlamaConfig


class TurboSparseMistralConfig(_SparseConfig, MistralConfig):
    model_type = "turbosparse_mistral"
    hidden_act: str = ""


class TurboSparseMistralForCausalLM(_SparseModel, MistralForCausalLM):
    config_class = TurboSparseMistralConfig


class TurboSparseQwen2Config(_SparseConfig, Qwen2Config):
    model_type = "turbosparse_qwen2"
    hidden_act: str = ""


class TurboSparseQwen2ForCausalLM(_SparseModel, Qwen2ForCausalLM):
    config_class = TurboSparseQwen2Config


class TurboSparseQwen3Config(_SparseConfig, Qwen3Config):
    model_type = "turbosparse_qwen3"
    hidden_act: str = ""


class TurboSparseQwen3ForCausalLM(_SparseModel, Qwen3ForCausalLM):
    config_class = TurboSparseQwen3Config


class TurboSparseGemma2Config(_SparseConfig, Gemma2Config):
    model_type = "turbosparse_gemma2"
    activation_key = "hidden_activation"
    hidden_activation: str = ""


class TurboSparseGemma2ForCausalLM(_SparseModel, Gemma2ForCausalLM):
    config_class = TurboSparseGemma2Config


class TurboSparseGemma3TextConfig(_SparseConfig, Gemma3TextConfig):
    model_type = "turbosparse_gemma3_text"
    activation_key = "hidden_activation"
    hidden_activation: str = ""


class TurboSparseGemma3TextForCausalLM(_SparseModel, Gemma3ForCausalLM):
    config_class = TurboSparseGemma3TextConfig


# model_type of the dense family: config and model of its sparse form
FAMILIES: dict[str, tuple[type[Any], type[Any]]] = {
    "llama": (TurboSparseLlamaConfig, TurboSparseLlamaForCausalLM),
    "mistral": (TurboSparseMistralConfig, TurboSparseMistralForCausalLM),
    "qwen2": (TurboSparseQwen2Config, TurboSparseQwen2ForCausalLM),
    "qwen3": (TurboSparseQwen3Config, TurboSparseQwen3ForCausalLM),
    "gemma2": (TurboSparseGemma2Config, TurboSparseGemma2ForCausalLM),
    "gemma3_text": (TurboSparseGemma3TextConfig, TurboSparseGemma3TextForCausalLM),
}


def check_dense(config: Any) -> None:
    """Check that a family's config is one that the swap understands.

    Raises:
        ValueError: its FFN is not gated by the activation that the family was trained with, or is a mixture of experts.
    """
    key = FAMILIES[config.model_type][0].activation_key
    activation = getattr(config, key, None)
    if activation not in DENSE_ACTIVATIONS:
        raise ValueError(f"`{key}` is {activation!r}; the swap starts from one of {', '.join(DENSE_ACTIVATIONS)}")
