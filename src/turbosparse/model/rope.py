"""Rotary position settings of Hugging Face configs, old spelling and new.

transformers 5 writes `rope_parameters`, flat or one per layer type; before, there were `rope_theta`, `rope_scaling` and
Gemma 3's `rope_local_base_freq`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from turbosparse.model.fields import Fields

THETA_BOUNDS = (1.0, 1e12)
FACTOR_BOUNDS = (1e-3, 1e4)
_DEFAULT_THETA = 10000.0


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's scaling, which slows only the low frequencies (all positive; `context` in tokens)."""

    factor: float
    low: float
    high: float
    context: int


@dataclass(frozen=True)
class Rope:
    """RoPE settings of a model.

    Attributes:
        theta: base of the frequencies.
        theta_local: base in sliding layers, None where it is the same.
        scale: positions are divided by it, in layers that do not slide.
        llama3: frequency-wise scaling, or None.
    """

    theta: float
    theta_local: float | None
    scale: float
    llama3: Llama3Scaling | None


def rope_from_hf(config: Mapping[str, object], source: str, theta_local: float | None) -> Rope:
    """RoPE settings of a config.json.

    Args:
        config: its text part.
        source: what to call it in errors.
        theta_local: the family's base for sliding layers, None where it has one base only.

    Raises:
        UserError: a scaling that the engine does not know, or values that cannot be.
    """
    parts = _merged(config, source)
    full = Fields(f"{source}, RoPE", parts["full_attention"])
    theta = full.number("rope_theta", THETA_BOUNDS, _DEFAULT_THETA)
    scale, llama3 = _scaling(full)
    if theta_local is not None:
        sliding = Fields(f"{source}, RoPE of sliding layers", parts["sliding_attention"])
        theta_local = sliding.number("rope_theta", THETA_BOUNDS, theta_local)
        if _kind(sliding) != "default":
            sliding.fail(f"the scaling {_kind(sliding)!r} in sliding layers is not supported")
    return Rope(theta, theta_local, scale, llama3)


def frequency_factors(rope: Rope, head_dim: int) -> npt.NDArray[np.float32] | None:
    """Divisors of the `head_dim / 2` frequencies, float32: the tensor `rope_freqs.weight`; None if all are 1.

    Wavelengths below context / high keep their frequency, above context / low it is divided by `factor`, and between
    the two the frequency is interpolated (Llama 3.1, https://arxiv.org/abs/2407.21783).
    """
    if rope.llama3 is None:
        return None
    scaling = rope.llama3
    frequency = rope.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = scaling.context * frequency / (2 * math.pi)
    smooth = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / scaling.factor + smooth)).astype(np.float32)


def _merged(config: Mapping[str, object], source: str) -> dict[str, Mapping[str, object]]:
    """One flat dictionary for full and one for sliding layers, whatever the spelling."""
    given = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or {}
    for part in (given, scaling):
        if not isinstance(part, dict):
            Fields(source, config).fail("rope_parameters or rope_scaling is not a JSON object")
    assert isinstance(given, dict) and isinstance(scaling, dict)
    top = {key: config.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    local = {"rope_theta": config.get("rope_local_base_freq")}
    if isinstance(given.get("full_attention"), dict) or isinstance(given.get("sliding_attention"), dict):
        full, sliding = given.get("full_attention") or {}, given.get("sliding_attention") or {}
        if not isinstance(full, dict) or not isinstance(sliding, dict):
            Fields(source, config).fail("rope_parameters of a layer type is not a JSON object")
        return {"full_attention": {**top, **full}, "sliding_attention": {**local, **sliding}}
    return {"full_attention": {**top, **scaling, **given}, "sliding_attention": local}


def _kind(fields: Fields) -> str:
    return fields.text("rope_type", fields.text("type", "default"))


def _scaling(fields: Fields) -> tuple[float, Llama3Scaling | None]:
    if fields.number("partial_rotary_factor", (0.0, 1.0), 1.0) != 1.0:
        fields.fail("rotating a part of each head (partial_rotary_factor) is not supported")
    kind = _kind(fields)
    if kind == "default":
        return 1.0, None
    if kind == "linear":
        return fields.number("factor", FACTOR_BOUNDS), None
    if kind != "llama3":
        fields.fail(f"the RoPE scaling {kind!r} is not supported; default, linear and llama3 are")
    scaling = Llama3Scaling(
        factor=fields.number("factor", FACTOR_BOUNDS),
        low=fields.number("low_freq_factor", FACTOR_BOUNDS),
        high=fields.number("high_freq_factor", FACTOR_BOUNDS),
        context=fields.integer("original_max_position_embeddings", (1, 1 << 26)),
    )
    if scaling.high <= scaling.low:
        fields.fail("high_freq_factor is not above low_freq_factor")
    return 1.0, scaling
