"""What the native kernels must compute, in numpy: weights dequantised by the gguf package, products in float64."""

from __future__ import annotations

from dataclasses import dataclass

import gguf
import numpy as np
import numpy.typing as npt

BLOCK = 32
TYPES = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
}
BLOCKED = ("q4_0", "q8_0")
OFFSET = {"q4_0": 8, "q8_0": 128}  # what makes the quants unsigned bytes
BLOCK_BYTES = {"q4_0": 18, "q8_0": 34}  # in ggml's own layout, with the scale


@dataclass(frozen=True)
class Weights:
    """A matrix in a GGUF type: its bytes [rows, row_bytes] uint8, and its exact values [rows, cols] float32."""

    type: str
    raw: npt.NDArray[np.uint8]
    values: npt.NDArray[np.float32]

    @property
    def quants(self) -> npt.NDArray[np.int64]:
        """Signed quants [rows, cols] of a blocked type."""
        blocks = self.raw.reshape(len(self.raw), -1, BLOCK_BYTES[self.type])[:, :, 2:]
        if self.type == "q8_0":
            quants = blocks.view(np.int8).astype(np.int64)
        else:
            quants = np.concatenate([blocks & 15, blocks >> 4], axis=2).astype(np.int64) - OFFSET["q4_0"]
        return quants.reshape(len(self.raw), -1)

    @property
    def scales(self) -> npt.NDArray[np.float64]:
        """Block scales [rows, cols / 32] of a blocked type."""
        blocks = self.raw.reshape(len(self.raw), -1, BLOCK_BYTES[self.type])[:, :, :2]
        return np.ascontiguousarray(blocks).view(np.float16)[:, :, 0].astype(np.float64)


def random_weights(rng: np.random.Generator, type: str, rows: int, cols: int) -> Weights:
    """Weights of any bits that the type allows, so that each quant, sign and a subnormal scale occur."""
    if type == "f32":
        raw = rng.standard_normal((rows, cols), dtype=np.float32).view(np.uint8)
    elif type == "f16":
        raw = (rng.standard_normal((rows, cols)) * 10.0 ** rng.integers(-6, 2, (rows, cols))).astype(np.float16)
        raw = raw.view(np.uint8)
    elif type == "bf16":
        raw = (rng.standard_normal((rows, cols), dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16)
        raw = raw.view(np.uint8)
    else:
        blocks = rng.integers(0, 256, (rows, cols // BLOCK, BLOCK_BYTES[type]), dtype=np.uint8)
        scales = (rng.standard_normal((rows, cols // BLOCK, 1)) * 0.05).astype(np.float16)
        scales[rng.random(scales.shape) < 0.05] = np.float16(3e-7)
        blocks[:, :, :2] = scales.view(np.uint8)
        raw = blocks.reshape(rows, -1)
    return Weights(type, raw, gguf.quants.dequantize(raw, TYPES[type]).astype(np.float32).reshape(rows, cols))


@dataclass(frozen=True)
class Int8:
    """Vectors as int8: x ~ q * scale. q [count, cols], scale and sum [count, cols / 32]."""

    q: npt.NDArray[np.int8]
    scale: npt.NDArray[np.float32]
    sum: npt.NDArray[np.int32]


def quantize(x: npt.NDArray[np.float32]) -> Int8:
    """Symmetric int8 by blocks of 32 columns, to nearest even; x [count, cols], finite."""
    blocks = x.reshape(len(x), -1, BLOCK)
    largest = np.abs(blocks).max(axis=2)
    largest[largest < np.float32(2.0**-100)] = 0  # no normal scale: counts as zero
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(largest > 0, np.float32(127) / largest, np.float32(0))
    q = np.rint(blocks * inverse[:, :, None]).astype(np.int8)
    return Int8(q.reshape(x.shape), largest / np.float32(127), q.sum(axis=2, dtype=np.int32))


def packed_order(cols: int) -> npt.NDArray[np.int64]:
    """order[i] = the column that byte i of packed activations holds (the layout of csrc/kernels/pack.h)."""
    order = np.empty(cols, np.int64)
    begin, left = 0, cols // BLOCK
    while left:
        group = next(size for size in (16, 8, 4, 2, 1) if size <= left)
        for block in range(group):
            for byte in range(BLOCK):
                place = 4 * (byte // 4 * group + block) + byte % 4
                order[begin * BLOCK + place] = (begin + block) * BLOCK + byte
        begin, left = begin + group, left - group
    return order


def dot(w: Weights, x: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """<row, vector> [count, rows] and a bound of the error of any float32 order of summation.

    gamma_n = n u / (1 - n u) times the sum of magnitudes (Higham, Accuracy and Stability of Numerical Algorithms, 3.1),
    with n products and the rounding of each; w's values are exact.
    """
    exact = x.astype(np.float64) @ w.values.T.astype(np.float64)
    magnitude = np.abs(x).astype(np.float64) @ np.abs(w.values).T.astype(np.float64)
    return exact, _gamma(x.shape[1] + 2) * magnitude + 1e-40


def dot_int8(w: Weights, x: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The same with int8 activations: a bound of the error of float32 sums of exact integer products of blocks.

    Kernels may sum unsigned quants and take the offset off in another term, so both count with their magnitude.
    """
    count, cols = x.shape
    quants = w.quants.reshape(len(w.raw), -1, BLOCK)
    int8 = quantize(x)
    q = int8.q.astype(np.int64).reshape(count, -1, BLOCK)
    scale = w.scales[None] * int8.scale.astype(np.float64)[:, None]  # [count, rows, blocks]
    exact = (np.einsum("rbi,vbi->vrb", quants, q) * scale).sum(axis=2)
    offset = OFFSET[w.type]
    terms = np.einsum("rbi,vbi->vrb", quants + offset, np.abs(q)) + offset * np.abs(int8.sum)[:, None]
    return exact, _gamma(cols // 4 + 3) * (terms * np.abs(scale)).sum(axis=2) + 1e-40


def axpy(
    w: Weights, rows: npt.NDArray[np.int32], coefficient: npt.NDArray[np.float32], y: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """y + sum of coefficient[i] * w[rows[i]] and a bound of its float32 error, both [cols]."""
    parts = coefficient.astype(np.float64)[:, None] * w.values[rows].astype(np.float64)
    magnitude = np.abs(y) + np.abs(parts).sum(axis=0)
    return y + parts.sum(axis=0), _gamma(len(rows) + 3) * magnitude + 1e-40


def sigmoid(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


def swiglu(gate: npt.NDArray[np.float32], up: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    g = gate.astype(np.float64)
    return g * sigmoid(g) * up


def geglu(gate: npt.NDArray[np.float32], up: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    g = gate.astype(np.float64)
    return g / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))) * up


def _gamma(n: int) -> float:
    unit = 2.0**-24
    return n * unit / (1 - n * unit)


def level_sum(
    w: Weights, rows: npt.NDArray[np.int32], coefficient: npt.NDArray[np.float32], most: int, y: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """y + sum of coefficient * row [cols] with coefficients as integers (csrc/kernels/sums.h), and an error bound.

    A level is rounded to half a step of the largest coefficient times scale; float32 makes a few roundings more.
    """
    exact = y + coefficient.astype(np.float64) @ w.values[rows].astype(np.float64)
    if not len(rows):
        return exact, np.zeros_like(exact)
    products = np.abs(coefficient[:, None] * w.scales[rows])
    largest_quant = {"q4_0": 8, "q8_0": 128}[w.type]
    step = products.max() / min(32767, (7 << 28) // (most * largest_quant))
    magnitude = np.abs(coefficient).astype(np.float64) @ np.abs(w.values[rows]).astype(np.float64)
    half_steps = 0.5 * step * np.abs(w.quants[rows]).sum(axis=0)
    return exact, half_steps * 1.01 + 1e-6 * (magnitude + np.abs(y))
