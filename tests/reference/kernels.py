"""What the native kernels must compute, slowly, in float64 and by the `gguf` package's dequantisation.

Every function that a kernel is compared with also returns how far fp32 may be from it: the bound on the error of a sum
of n products in any order, (n + 2) u sum |a_i b_i| with u = 2^-24 (Higham, Accuracy and Stability of Numerical
Algorithms, section 3.1; two more roundings for the factors). Int8 activations are compared with the exact product of the
*rounded* activations, so that no tolerance hides a wrong quant.
"""

from __future__ import annotations

import gguf
import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
Float32 = npt.NDArray[np.float32]

BLOCK = 32
GROUP = 16
UNIT = 2.0**-24
TYPES = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
}
BLOCKED = ("q8_0", "q4_0")


def encode(weights: Float32, type_name: str) -> npt.NDArray[np.uint8]:
    """GGUF bytes of a matrix [rows, cols]."""
    kind = TYPES[type_name]
    if weights.size == 0:
        return np.empty(0, np.uint8)
    return np.ascontiguousarray(gguf.quantize(weights, kind)).view(np.uint8).reshape(-1)


def decode(data: npt.NDArray[np.uint8], type_name: str, rows: int, cols: int) -> Float64:
    """The weights [rows, cols] that these bytes stand for."""
    if rows == 0:
        return np.empty((0, cols))
    return gguf.dequantize(data.reshape(rows, -1), TYPES[type_name]).reshape(rows, cols).astype(np.float64)


def group_sizes(blocks: int) -> list[int]:
    """A row's groups: sixteens, then the binary digits of what is left."""
    sizes = [GROUP] * (blocks // GROUP)
    return sizes + [size for size in (8, 4, 2, 1) if blocks % GROUP & size]


def kernel_order(q: npt.NDArray[np.int8]) -> npt.NDArray[np.int8]:
    """Columns of one vector [n] in the order of csrc/kernels/pack.h: dwords of a group's blocks side by side."""
    groups = []
    begin = 0
    for size in group_sizes(q.size // BLOCK):
        end = begin + size * BLOCK
        groups.append(q[begin:end].reshape(size, BLOCK // 4, 4).transpose(1, 0, 2).reshape(-1))
        begin = end
    return np.concatenate(groups) if groups else q


def quantize(x: Float32) -> tuple[npt.NDArray[np.int8], Float32, npt.NDArray[np.int32]]:
    """Symmetric int8 in blocks of 32: q [n] in the order of columns, scale [n / 32], sum of q [n / 32]."""
    blocks = x.reshape(-1, BLOCK)
    largest = np.abs(blocks).max(axis=1, initial=0).astype(np.float32)
    usable = largest >= 2.0**-100
    scale = np.where(usable, largest / np.float32(127), np.float32(0)).astype(np.float32)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(usable, np.float32(127) / largest, np.float32(0)).astype(np.float32)
    q = np.rint(blocks * inverse[:, None]).astype(np.int8)
    return q.reshape(-1), scale, q.sum(axis=1, dtype=np.int32)


def rounded(x: Float32) -> Float64:
    """Vectors [count, cols] after a round trip through int8."""
    out = np.empty(x.shape)
    for index, vector in enumerate(x):
        q, scale, _ = quantize(vector)
        out[index] = (q.reshape(-1, BLOCK).astype(np.float64) * scale.astype(np.float64)[:, None]).reshape(-1)
    return out


def dot(weights: Float64, x: Float64) -> tuple[Float64, Float64]:
    """Products [count, rows] of vectors x [count, cols] with each row, and their error bounds in fp32."""
    terms = weights.shape[1] + 2
    return x @ weights.T, terms * UNIT * (np.abs(x) @ np.abs(weights).T)


def axpy(weights: Float64, rows: npt.NDArray[np.int32], coefficient: Float32, y: Float32) -> tuple[Float64, Float64]:
    """y [cols] plus the listed rows times their coefficients, and the error bound in fp32."""
    products = coefficient.astype(np.float64)[:, None] * weights[rows]
    total = y + products.sum(axis=0)
    return total, (len(rows) + 3) * UNIT * (np.abs(y) + np.abs(products).sum(axis=0))


def rms_norm(x: Float32, weight: Float32, eps: float) -> Float64:
    """x / sqrt(mean(x^2) + eps) * weight."""
    wide = x.astype(np.float64)
    return wide / np.sqrt(np.mean(wide**2) + eps) * weight


def swiglu(gate: Float32, up: Float32) -> Float64:
    """silu(gate) * up."""
    wide = gate.astype(np.float64)
    with np.errstate(over="ignore"):
        return wide / (1 + np.exp(-wide)) * up


def geglu(gate: Float32, up: Float32) -> Float64:
    """gelu_tanh(gate) * up (Hendrycks and Gimpel, arXiv 1606.08415, section 2)."""
    wide = gate.astype(np.float64)
    inner = np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)
    # 1 + tanh u without its cancellation at large negative u.
    with np.errstate(over="ignore"):
        return wide / (1 + np.exp(-2 * inner)) * up
