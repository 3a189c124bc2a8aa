"""Random rows in the storage of a ggml type, drawn as levels and never quantised."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

BLOCK = 32
# Highest level and standard deviation of the random levels: of Q4_0's 16, the lowest is drawn as a second zero.
_LEVELS = {Type.Q4_0: (7, math.sqrt(2 * 140 / 16)), Type.Q8_0: (127, math.sqrt((255**2 - 1) / 12))}
_FLOATS = {Type.F16: np.float16, Type.F32: np.float32}


@dataclass(frozen=True)
class Rows:
    """Statistics of random rows.

    Attributes:
        spread: standard deviation of the weights.
        offset: mean of the first weight of every block of 32 columns; those weights are it, rounded up or down to a
            level at random. None: they are like the others.
        ternary: whether a weight is one of three levels, -1, 0 and 1, instead of as many as the type has.
    """

    spread: float
    offset: float | None = None
    ternary: bool = False


def random_rows(rng: np.random.Generator, shape: tuple[int, ...], kind: Type, of: Rows) -> npt.NDArray[np.uint8]:
    """Random weights in the storage of `kind`, uint8 [rows, bytes of a row].

    Args:
        shape: (rows, columns); columns are whole blocks of 32 unless `kind` is F16 or F32.
        of: their statistics.
    """
    rows, columns = shape
    if of.ternary:
        step = of.spread / math.sqrt(2 / 3)
        levels = rng.integers(-1, 2, size=(rows, columns), dtype=np.int8)
        if of.offset is not None:
            mean = of.offset / step + rng.random((rows, columns // BLOCK), np.float32)
            levels[:, ::BLOCK] = np.clip(np.floor(mean), -1, 1)
        return few_levels(levels, step, kind)
    if kind not in _LEVELS:
        values = (rng.random(shape, np.float32) * 2 - 1) * np.float32(math.sqrt(3) * of.spread)
        if of.offset is not None:
            values[:, ::BLOCK] = of.offset
        return values.astype(_FLOATS[kind]).view(np.uint8).reshape(rows, -1)
    highest, deviation = _LEVELS[kind]
    blocks = rows * columns // BLOCK
    step = of.spread / deviation
    constant = None
    if of.offset is not None:
        level = np.floor(of.offset / step + rng.random(blocks, np.float32))
        constant = np.clip(level, -highest, highest).astype(np.int8)
    out, payload = _blocks(blocks, kind, step)
    if kind is Type.Q4_0:
        payload[:] = _Q4_0_BYTES[rng.integers(256, size=payload.shape, dtype=np.uint8)]
        if constant is not None:  # element 0 is the low half of byte 0
            payload[:, 0] = (payload[:, 0] & 0xF0) | (constant + 8).astype(np.uint8)
    else:
        levels = rng.integers(-highest, highest + 1, size=payload.shape, dtype=np.int8)
        if constant is not None:
            levels[:, 0] = constant
        payload[:] = levels.view(np.uint8)
    return out.reshape(rows, -1)


def few_levels(levels: npt.NDArray[np.int8], scale: float, kind: Type) -> npt.NDArray[np.uint8]:
    """Rows of -scale, 0 and scale in the storage of `kind`; int8 [rows, columns] of -1, 0 and 1 to uint8."""
    rows, columns = levels.shape
    if kind not in _LEVELS:
        return (levels * np.float32(scale)).astype(_FLOATS[kind]).view(np.uint8).reshape(rows, -1)
    out, payload = _blocks(rows * columns // BLOCK, kind, scale)
    blocks = levels.reshape(-1, BLOCK)
    if kind is Type.Q4_0:
        nibbles = (blocks + 8).astype(np.uint8)
        payload[:] = nibbles[:, :16] | nibbles[:, 16:] << 4
    else:
        payload[:] = blocks.view(np.uint8)
    return out.reshape(rows, -1)


def _blocks(count: int, kind: Type, scale: float) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Blocks with their scale, and the view of what is to fill."""
    out = np.empty((count, 2 + (16 if kind is Type.Q4_0 else 32)), np.uint8)
    out[:, :2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    return out, out[:, 2:]


# Any byte to one without the level -8, which has no positive counterpart: it becomes 0.
_Q4_0_BYTES = np.array([(low or 8) | (high or 8) << 4 for high in range(16) for low in range(16)], np.uint8)
