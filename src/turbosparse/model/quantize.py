"""Between float32 and the storage types of ggml, a few rows at a time.

The formats are ggml's and decoding is the `gguf` package's. Encoding to Q4_0 is ours: same bytes, better chosen scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from turbosparse.errors import UserError
from turbosparse.model.gguf import GGUFTensor, row_bytes

Type = GGMLQuantizationType
WRITABLE = frozenset({Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0})
# Of the types whose rows can be negated: the bytes of an entry, or of a block with a scale, and which has the sign.
_SIGNS = {Type.F32: (4, 3), Type.F16: (2, 1), Type.Q8_0: (34, 1), Type.Q4_0: (18, 1)}
NEGATABLE = frozenset(_SIGNS)

# Elements converted at once. Small enough that the temporaries of the decoder stay in the last-level cache.
CHUNK_ELEMENTS = 1 << 18
# llama.cpp maps the entry of largest magnitude, m, to level -8. These are the levels that m is tried at instead.
_Q4_0_LEVELS = (-8.0, -8.6, -8.3, -7.7, -7.4, -7.1, -6.8)


def dequantize(data: npt.NDArray[np.uint8], kind: Type, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Decode a tensor.

    Args:
        data: uint8, its bytes, row after row.
        kind: its ggml type.
        shape: numpy order, rows first.

    Returns:
        float32, a new array of that shape.

    Raises:
        UserError: the type has no decoder.
        ValueError: `data` is not as long as type and shape say.
    """
    rows, columns = math.prod(shape[:-1]), shape[-1]
    stride = row_bytes(kind, columns)
    if data.size != rows * stride:
        raise ValueError(f"{data.size} bytes are not a {kind.name} tensor of shape {shape}")
    data = data.reshape(rows, stride)
    out = np.empty((rows, columns), np.float32)
    for start, stop in row_chunks(rows, columns):
        out[start:stop] = _decode(data[start:stop], kind)
    return out.reshape(shape)


def dequantize_rows(tensor: GGUFTensor, start: int, stop: int) -> npt.NDArray[np.float32]:
    """Decode rows `start` to `stop` of a tensor, float32 [stop - start, columns]; errors as in `dequantize`."""
    columns = tensor.shape[-1]
    stride = row_bytes(tensor.type, columns)
    return dequantize(tensor.data[start * stride : stop * stride], tensor.type, (stop - start, columns))


def quantize(array: npt.NDArray[np.floating], kind: Type) -> npt.NDArray[np.uint8]:
    """Encode an array.

    Args:
        array: floats, [..., columns]; columns is a multiple of the block size of `kind` (1 or 32).
        kind: one of `WRITABLE`.

    Returns:
        uint8, [..., bytes of a row].

    Raises:
        ValueError: the type is not writable, the row is not a whole number of blocks, or an entry is not finite (or
            does not fit `kind`).
    """
    if kind not in WRITABLE:
        raise ValueError(f"{kind.name} is not a type that is written")
    columns = array.shape[-1]
    stride = row_bytes(kind, columns)
    rows = array.reshape(-1, columns)
    out = np.empty((rows.shape[0], stride), np.uint8)
    for start, stop in row_chunks(*rows.shape):
        chunk = np.ascontiguousarray(rows[start:stop], np.float32)
        if not np.isfinite(chunk).all():
            raise ValueError("it holds infinities or NaNs")
        out[start:stop] = _encode(chunk, kind)
    return out.reshape(*array.shape[:-1], stride)


def negate(rows: npt.NDArray[np.uint8], kind: Type) -> npt.NDArray[np.uint8]:
    """Encoded rows, uint8 [..., bytes of a row], with the other sign, which costs no precision; `kind`: `NEGATABLE`."""
    size, sign = _SIGNS[kind]
    out = rows.copy()
    out.reshape(-1, size)[:, sign] ^= 0x80
    return out


def row_chunks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about `CHUNK_ELEMENTS` elements that cover `rows`."""
    step = max(1, CHUNK_ELEMENTS // columns)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def writable_type(kind: Type, columns: int) -> Type:
    """`kind`, or F16 where a row of `columns` is not a whole number of its blocks."""
    return Type.F16 if columns % GGML_QUANT_SIZES[kind][0] else kind


def _decode(rows: npt.NDArray[np.uint8], kind: Type) -> npt.NDArray[np.float32]:
    try:
        # A copy, because a row in a file may start at any byte and the decoder views it as floats.
        with np.errstate(all="ignore"):
            decoded: npt.NDArray[np.float32] = quants.dequantize(rows.copy(), kind)
    except NotImplementedError as error:
        raise UserError(
            f"Tensors of type {kind.name} cannot be decoded; use a file in another quantisation."
        ) from error
    return decoded


def _encode(rows: npt.NDArray[np.float32], kind: Type) -> npt.NDArray[np.uint8]:
    if kind is Type.Q4_0:
        blocks = rows.reshape(-1, 32)
        return _encode_q4_0(blocks).reshape(rows.shape[0], -1)
    if kind is Type.F16 and np.abs(rows).max(initial=0.0) > np.finfo(np.float16).max:
        raise ValueError("it holds values beyond the range of F16; choose another quantisation")
    encoded: npt.NDArray[np.generic] = quants.quantize(rows, kind)
    return encoded.view(np.uint8).reshape(rows.shape[0], -1)


def _encode_q4_0(blocks: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Q4_0 blocks, uint8 [n, 18], of float32 [n, 32]: the scale d (float16), then 4-bit levels q of w = d (q - 8).

    llama.cpp puts the entry of largest magnitude on the level -8. That keeps one entry exact and is not the scale of
    least squared error. Here every block tries a few levels for that entry, takes the least-squares scale of the
    rounding that each gives, d = <w, q> / <q, q>, and keeps the one with the smallest error. A block that holds -s, 0
    and s alone gets d = s: a row of such blocks has one scale, which the engine looks for (csrc/kernels/ternary.h).
    """
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1, keepdims=True), axis=1)
    # Blocks far below half precision's smallest number become zero; their inverse would overflow.
    inverse = np.divide(1.0, extreme, out=np.zeros_like(extreme), where=np.abs(extreme) > 1e-30)
    best_gain = np.full(len(blocks), -1.0, np.float32)
    scale = np.zeros(len(blocks), np.float32)
    levels = np.zeros(blocks.shape, np.float32)
    for level in _Q4_0_LEVELS:
        candidate = np.rint(blocks * (inverse * np.float32(level)))
        np.clip(candidate, -8, 7, out=candidate)
        product = np.einsum("nk,nk->n", blocks, candidate)
        energy = np.einsum("nk,nk->n", candidate, candidate)
        # |w - d q|^2 at the best d is |w|^2 - <w, q>^2 / <q, q>: the second term is the gain to maximise.
        gain = np.divide(product * product, energy, out=np.zeros_like(energy), where=energy > 0)
        better = gain > best_gain
        best_gain[better] = gain[better]
        scale[better] = np.divide(product, energy, out=np.zeros_like(energy), where=energy > 0)[better]
        levels[better] = candidate[better]
    size = np.abs(extreme)
    three = ((blocks == 0) | (np.abs(blocks) == size)).all(axis=1) & (size[:, 0] <= np.finfo(np.float16).max)
    scale[three], levels[three] = size[three, 0], np.sign(blocks[three])
    nibbles = (levels + 8).astype(np.uint8)
    packed = nibbles[:, :16] | (nibbles[:, 16:] << 4)
    return np.concatenate([scale.astype(np.float16)[:, None].view(np.uint8), packed], axis=1)
