"""The layers of a sparse GGUF model in torch, one at a time: what the inputs of its predictors are collected with.

Only the weights of one layer are in memory. They are those of the file, dequantised, so a predictor learns from what it
will meet, up to the rounding of activations in the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from turbosparse.model.config import ModelConfig
from turbosparse.model.gguf import GGUFFile
from turbosparse.model.layout import EMBEDDING, OUTPUT, OUTPUT_NORM, ROPE_FACTORS
from turbosparse.model.quantize import dequantize, dequantize_rows
from turbosparse.relufy.drelu import ACTIVATIONS, mirrored


def embed(file: GGUFFile, config: ModelConfig, tokens: list[int]) -> Tensor:
    """The residual stream before the first layer, float32 [tokens, hidden]."""
    table = file.tensors[EMBEDDING]
    rows = {token: torch.from_numpy(dequantize_rows(table, token, token + 1)[0]) for token in set(tokens)}
    return torch.stack([rows[token] for token in tokens]) * config.embedding_scale


def logits(file: GGUFFile, config: ModelConfig, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A function from the residual stream after the last layer, [..., hidden], to logits, [..., vocabulary]."""
    norm = tensor_of(file, OUTPUT_NORM, device)
    head = tensor_of(file, OUTPUT if OUTPUT in file.tensors else EMBEDDING, device)

    def of(stream: Tensor) -> Tensor:
        found = functional.rms_norm(stream, norm.shape, norm, config.norm_eps) @ head.T
        cap = config.logit_softcap
        return found if cap is None else cap * torch.tanh(found / cap)

    return of


@dataclass(frozen=True)
class Fired:
    """What one FFN saw and did: x, its normed input [..., hidden], and h, its activation [..., ffn]; float32."""

    x: Tensor
    h: Tensor


class Decoder:
    """One layer of a model with one FFN a layer.

    Args:
        file: the model, open.
        config: its config.
        layer: which.
        device: where to compute, in float32.
    """

    def __init__(self, file: GGUFFile, config: ModelConfig, layer: int, device: torch.device) -> None:
        self._config, self._layer, self._device = config, layer, device
        prefix = f"blk.{layer}."
        self._weights = {
            name.removeprefix(prefix).removesuffix(".weight"): tensor_of(file, name, device)
            for name in file.tensors
            if name.startswith(prefix) and name.endswith(".weight") and ".fc" not in name
        }
        self._biases = {
            name: tensor_of(file, f"{prefix}attn_{name}.bias", device)
            for name in ("q", "k", "v")
            if config.attention_bias
        }
        self._sliding = config.sliding_window is not None and config.sliding_layers[layer]
        factors = tensor_of(file, ROPE_FACTORS, device) if ROPE_FACTORS in file.tensors else None
        self._frequencies = self._rope(factors)

    def __call__(
        self, stream: Tensor, change: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Fired]:
        """Carry windows, float32 [windows, tokens, hidden], through the layer: the new stream, and what the FFN did.

        Args:
            stream: before the layer.
            change: what to go on with instead of h, from the FFN's input and h.
        """
        c, w = self._config, self._weights
        attended = self._attention(self._norm(stream, "attn_norm"))
        if c.post_norms:
            attended = self._norm(attended, "post_attention_norm")
        stream = stream + attended
        x = self._norm(stream, "ffn_norm")
        gate = (x @ w["ffn_gate"].T).repeat_interleave(c.neurons_per_gate, -1)
        up = x @ w["ffn_up"].T
        if c.mirrored_ups:
            up = mirrored(up)
        h = ACTIVATIONS[c.activation](torch.where(gate < c.gate_threshold, 0.0, gate), up)
        if c.activation_thresholds is not None:
            h = torch.where(h.abs() < c.activation_thresholds[self._layer], 0.0, h)
        if change is not None:
            h = change(x, h)
        out = h @ w["ffn_down_t"]
        if c.post_norms:
            out = self._norm(out, "post_ffw_norm")
        return stream + out, Fired(x, h)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], self._weights[name], self._config.norm_eps)

    def _attention(self, x: Tensor) -> Tensor:
        c = self._config
        q, k, v = (self._heads(x, name) for name in ("q", "k", "v"))
        if c.qk_norm:
            q, k = self._norm(q, "attn_q_norm"), self._norm(k, "attn_k_norm")
        q, k = self._rotate(q), self._rotate(k)
        shared = c.n_heads // c.n_kv_heads
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        window = c.sliding_window if self._sliding else None
        if c.attention_softcap is None and window is None:
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=c.attention_scale)
            return y.transpose(1, 2).flatten(2) @ self._weights["attn_output"].T
        far = torch.arange(x.shape[1], device=self._device)
        behind = far[:, None] - far
        seen = behind >= 0
        if window is not None:
            seen &= behind < window
        if c.attention_softcap is None:
            y = functional.scaled_dot_product_attention(q, k, v, seen, scale=c.attention_scale)
        else:
            scores = q @ k.transpose(2, 3) * c.attention_scale
            scores = c.attention_softcap * torch.tanh(scores / c.attention_softcap)
            y = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1) @ v
        return y.transpose(1, 2).flatten(2) @ self._weights["attn_output"].T

    def _heads(self, x: Tensor, name: str) -> Tensor:
        """Q, K or V, [windows, heads, tokens, head_dim]."""
        y = functional.linear(x, self._weights[f"attn_{name}"], self._biases.get(name))
        return y.unflatten(-1, (-1, self._config.head_dim)).transpose(1, 2)

    def _rope(self, factors: Tensor | None) -> Tensor:
        """Angles per position, float32 [head_dim / 2]."""
        c = self._config
        local = self._sliding and c.rope_theta_local is not None
        theta = c.rope_theta_local if local and c.rope_theta_local is not None else c.rope_theta
        exponent = torch.arange(0, c.head_dim, 2, dtype=torch.float64, device=self._device) / c.head_dim
        frequencies = theta**-exponent
        if not local:
            frequencies = frequencies / c.rope_scale
            if factors is not None:
                frequencies = frequencies / factors
        return frequencies.float()

    def _rotate(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[2], device=self._device)[:, None] * self._frequencies
        cosine, sine = angles.cos(), angles.sin()
        if self._config.rope_interleaved:
            a, b = x[..., ::2], x[..., 1::2]
        else:
            a, b = x.chunk(2, -1)
        turned = (a * cosine - b * sine, a * sine + b * cosine)
        return torch.stack(turned, -1).flatten(-2) if self._config.rope_interleaved else torch.cat(turned, -1)


def tensor_of(file: GGUFFile, name: str, device: torch.device) -> Tensor:
    tensor = file.tensors[name]
    return torch.from_numpy(dequantize(tensor.data, tensor.type, tensor.shape)).to(device)
