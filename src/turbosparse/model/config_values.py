"""What both sides of a model's description read alike: the bounds of its values, and the relations between them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from turbosparse.model.families import Family
from turbosparse.model.fields import Bounds, Fields

if TYPE_CHECKING:
    from turbosparse.model.config import ModelConfig

_Number = TypeVar("_Number", int, float)

# Far above every known model, and low enough that no product of two of them is more than a large allocation.
LAYERS: Bounds = (1, 1024)
WIDTH: Bounds = (1, 1 << 17)
FFN: Bounds = (1, 1 << 20)
HEADS: Bounds = (1, 4096)
HEAD_DIM: Bounds = (2, 1024)
VOCAB: Bounds = (1, 1 << 22)
CONTEXT: Bounds = (1, 1 << 26)
EXPERTS: Bounds = (0, 1024)
EPSILON: Bounds = (0.0, 1.0)
POSITIVE: Bounds = (1e-6, 1e6)
THRESHOLD: Bounds = (0.0, 1e6)
GATE_GROUP: Bounds = (1, 64)


def experts(fields: Fields, count: str, used: str) -> tuple[int, int]:
    """Experts of a layer, and those that a token takes."""
    number = fields.integer(count, (1, EXPERTS[1]))
    return number, fields.integer(used, (1, number))


def default_head_dim(fields: Fields, hidden: int, n_heads: int) -> int:
    """hidden / heads, or an impossible size where that is no whole number (it matters only if none is stated)."""
    return hidden // n_heads if hidden % n_heads == 0 else 0


def embedding_scale(family: Family, hidden: int) -> float:
    """Factor of the embedding."""
    return math.sqrt(hidden) if family.scaled_embedding else 1.0


def softcap(fields: Fields, key: str, default: float | None) -> float | None:
    """c in c tanh(x / c); None: no cap."""
    if not fields.has(key):
        return default
    return fields.number(key, POSITIVE)


def numbers(fields: Fields, key: str, kind: type[_Number], count: int) -> list[_Number]:
    """A list of `count` finite numbers of one type."""
    values = fields.get(key)
    found = [value for value in values if type(value) is kind] if isinstance(values, list) else []
    whole = isinstance(values, list) and len(found) == len(values) == count
    if not whole or not all(map(math.isfinite, found)):
        fields.fail(f"{key} is not a list of {count} numbers")
    return found


def activation_thresholds(fields: Fields, n_layers: int) -> tuple[float, ...] | None:
    """One a layer, or None."""
    key = "activation_threshold"
    if not fields.has(key):
        return None
    values = [float(np.float32(value)) for value in numbers(fields, key, float, n_layers)]
    if not all(THRESHOLD[0] <= value <= THRESHOLD[1] for value in values):
        fields.fail(f"{key} holds a number that is not from 0 to {THRESHOLD[1]:g}")
    return tuple(values)


def neurons_per_gate(fields: Fields) -> int:
    """1 unless it is stated."""
    return fields.integer("neurons_per_gate", GATE_GROUP, 1)


def mirrored_ups(fields: Fields) -> bool:
    """False unless it is stated."""
    return fields.flag("mirrored_ups", False)


def periodic_windows(n_layers: int, period: int) -> tuple[bool, ...]:
    """Every `period`-th layer attends to everything, the others slide."""
    return tuple((layer + 1) % period != 0 for layer in range(n_layers))


def runtime_attention_scale(family: Family, hidden: int, n_heads: int, n_layers: int, head_dim: int) -> float:
    """What llama.cpp multiplies the scores of such a model with; its files do not state it."""
    width = hidden / n_heads if n_layers == family.width_scaled_layers else head_dim
    return float(np.float32(width**-0.5))


def checked(config: ModelConfig, fields: Fields) -> ModelConfig:
    """Relations between the values; each on its own is within bounds already."""
    if config.n_heads % config.n_kv_heads:
        fields.fail(f"{config.n_heads} attention heads cannot share {config.n_kv_heads} key-value heads evenly")
    if config.head_dim % 2:
        fields.fail(f"the head size {config.head_dim} is odd, so rotary positions cannot pair its dimensions")
    if config.ffn_size % config.neurons_per_gate:
        fields.fail(f"{config.ffn_size} neurons cannot share gates evenly, {config.neurons_per_gate} to a gate")
    if config.neurons_per_gate > 1 and config.experts > 0:
        fields.fail("experts whose neurons share gates are not supported")
    if config.mirrored_ups and config.activation != "drelu":
        fields.fail(
            f"mirrored ups need the activation drelu, not {config.activation}, whose neurons fire for either sign"
        )
    if config.mirrored_ups and config.neurons_per_gate % 2:
        fields.fail(f"mirrored ups need neurons that share gates in pairs, not {config.neurons_per_gate} to a gate")
    return config
