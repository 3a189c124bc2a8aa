"""The bound of a sketch: no product is further from it, and many are nearly as far."""

import gguf
import numpy as np
import pytest
from reference import kernels as reference

from turbosparse._native import kernels

isa = pytest.mark.parametrize("isa", kernels.available())
TYPES = ("f32", "f16", "bf16", "q8_0")
COLUMNS = (32, 96, 576, 1536)
Q4_0 = reference.TYPES["q4_0"]


def stored(values: np.ndarray, type: str) -> reference.Weights:
    kind = reference.TYPES[type]
    raw = gguf.quants.quantize(values.astype(np.float32), kind).view(np.uint8).reshape(len(values), -1)
    return reference.Weights(type, raw, gguf.quants.dequantize(raw, kind).astype(np.float32).reshape(values.shape))


def packed(isa: str, weights: reference.Weights) -> kernels.Matrix:
    kind = int(reference.TYPES[weights.type])
    return kernels.Matrix(isa, kind, *weights.values.shape, weights.raw.reshape(-1))


def vectors(isa: str, x: np.ndarray, both: bool) -> kernels.Vectors:
    first = reference.quantize(x[None])
    lost = x[None] - np.repeat(first.scale, reference.BLOCK, axis=1) * first.q
    return kernels.Vectors(isa, x[None], int8=True, rest=lost.astype(np.float32) if both else None)


def errors(isa: str, weights: reference.Weights, x: np.ndarray, squares: np.ndarray, both: bool) -> np.ndarray:
    """|product - that of the sketch| over the bound, of each row."""
    matrix = packed(isa, weights)
    sketch = kernels.Sketch(matrix, squares.tolist())
    inputs = vectors(isa, x, both)
    apart = np.abs(matrix.dot(inputs, 0, len(weights.values))[0].astype(np.float64) - sketch.dot(inputs))
    return apart / (sketch.bounds().astype(np.float64) * sketch.length(inputs))


def terms(type: str) -> tuple[bool, ...]:
    return (False, True) if type == "q8_0" else (True,)  # rows without blocks meet fp32: their sketch needs both


@isa
@pytest.mark.parametrize("type", TYPES)
def test_no_product_is_further_than_the_bound(isa, type):
    for columns in COLUMNS:
        rng = np.random.default_rng(columns)
        usual = 10.0 ** rng.uniform(-2, 2, columns)
        cases = [reference.random_weights(rng, type, 33, columns), stored(rng.standard_normal((33, columns)), type)]
        cases = [weights for weights in cases if np.linalg.norm(weights.values, axis=1).max() < 6e4]
        for weights in cases:
            for x in (usual, np.ones(columns), np.eye(columns)[3], np.full(columns, 1e-20), np.zeros(columns)):
                x = (x * rng.standard_normal(columns)).astype(np.float32)
                for squares, both in ((usual**2, True), (np.zeros(columns), terms(type)[0])):
                    assert errors(isa, weights, x, squares, both).max() <= 1


@isa
@pytest.mark.parametrize("type", TYPES)
def test_a_vector_along_what_was_lost_comes_near_the_bound(isa, type):
    """So a bound of nine tenths would be wrong, and one that is larger than it must be fails too."""
    rng = np.random.default_rng(1)
    weights = stored(rng.standard_normal((5, 576)), type)
    raw = gguf.quants.quantize(weights.values, Q4_0)
    lost = weights.values - gguf.quants.dequantize(raw, Q4_0).astype(np.float32)
    for row, both in ((row, both) for row in range(5) for both in terms(type)):
        assert 0.9 < errors(isa, weights, lost[row], np.zeros(576), both)[row] <= 1
    # With weights of the columns: along lost * weight^2.
    squares = rng.uniform(0, 9, 576)
    weight = (1 + squares / squares.mean()) ** 0.25
    x = (lost[0] * weight**2).astype(np.float32)
    assert 0.9 < errors(isa, weights, x, squares, True)[0] <= 1


@isa
@pytest.mark.parametrize("type", TYPES)
def test_rounding_is_in_the_bound(isa, type):
    """Rows that q4_0 holds exactly: all that differs is the order of sums and what it rounds."""
    rng = np.random.default_rng(2)
    scale = 2.0 ** rng.integers(-9, -2, (64, 18, 1))
    blocks = rng.integers(-8, 8, (64, 18, 32)) * scale
    blocks[:, :, 0] = -8 * scale[:, :, 0]
    values = blocks.reshape(64, 576).astype(np.float32)
    weights = stored(values, type)
    np.testing.assert_allclose(weights.values, values, rtol=0.01)
    x = rng.standard_normal(576).astype(np.float32)
    ratio = errors(isa, weights, x, np.zeros(576), True)
    assert 0 < ratio.max() <= 1


def test_a_row_that_has_no_sketch_is_known():
    for value in (np.nan, np.inf, 1e6):
        values = np.ones((3, 64), np.float32)
        values[1, 5] = value
        weights = reference.Weights("f32", values.view(np.uint8), values)
        assert np.isinf(kernels.Sketch(packed("generic", weights), [1.0] * 64).largest)
    assert kernels.Sketch(packed("generic", stored(np.ones((3, 64)), "f32")), [1.0] * 64).largest < 100


def test_impossible_sketches():
    rng = np.random.default_rng(3)
    coarse = packed("generic", reference.random_weights(rng, "q4_0", 4, 64))
    with pytest.raises(ValueError, match="saves nothing"):
        kernels.Sketch(coarse, [1.0] * 64)
    fine = packed("generic", reference.random_weights(rng, "q8_0", 4, 64))
    with pytest.raises(ValueError, match="a column"):
        kernels.Sketch(fine, [1.0] * 32)
    sketch = kernels.Sketch(fine, [1.0] * 64)
    with pytest.raises(ValueError, match="int8 vector"):
        sketch.length(kernels.Vectors("generic", np.ones((1, 64), np.float32), int8=False))
