"""Kernels at drawn shapes: every group size of a blocked row, rows wider than axpy's tile, no row at all, a fresh y."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import kernels as reference

from turbosparse._native import kernels

each_isa = pytest.mark.parametrize("isa", kernels.available())
AXPY_TILE_BLOCKS = 128  # simd_lanes.h
blocks = st.one_of(st.integers(1, 40), st.integers(AXPY_TILE_BLOCKS - 2, AXPY_TILE_BLOCKS + 33))
seeds = st.integers(0, 2**32 - 1)


def case(isa: str, kind: str, rows: int, cols: int, seed: int) -> tuple[np.random.Generator, reference.Weights, Any]:
    rng = np.random.default_rng(seed)
    weights = reference.random_weights(rng, kind, rows, cols)
    return rng, weights, kernels.Matrix(isa, int(reference.TYPES[kind]), rows, cols, weights.raw.reshape(-1))


def bits(x: npt.NDArray[np.float32]) -> npt.NDArray[np.uint32]:
    return np.ascontiguousarray(x).view(np.uint32)


@each_isa
@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(reference.BLOCKED), blocks=blocks, rows=st.integers(1, 9), count=st.integers(1, 17), seed=seeds
)
def test_blocked_dot(isa: str, kind: str, blocks: int, rows: int, count: int, seed: int) -> None:
    """int8 products within the bound, and each vector's bits those of the vector alone."""
    rng, weights, matrix = case(isa, kind, rows, 32 * blocks, seed)
    x = rng.standard_normal((count, 32 * blocks), dtype=np.float32)
    together = matrix.dot(kernels.Vectors(isa, x, int8=True), 0, rows)
    expected, bound = reference.dot_int8(weights, x)
    assert (np.abs(together - expected) <= bound).all()
    v = int(rng.integers(count))
    alone = matrix.dot(kernels.Vectors(isa, x[v : v + 1], int8=True), 0, rows)
    np.testing.assert_array_equal(bits(together[v]), bits(alone[0]))


@each_isa
@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(list(reference.TYPES)), blocks=blocks, rows=st.integers(1, 13), fresh=st.booleans(), seed=seeds
)
def test_axpy(isa: str, kind: str, blocks: int, rows: int, fresh: bool, seed: int) -> None:
    """The sum within the bound; with and without the rows whose coefficient is zero, the same bits."""
    rng, weights, matrix = case(isa, kind, rows, 32 * blocks, seed)
    y = np.zeros(32 * blocks, np.float32) if fresh else rng.standard_normal(32 * blocks, dtype=np.float32)
    coefficient = rng.standard_normal(rows, dtype=np.float32)
    coefficient[rng.random(rows) < 0.5] = 0
    every, firing = np.arange(rows, dtype=np.int32), np.flatnonzero(coefficient).astype(np.int32)
    expected, bound = reference.axpy(weights, every, coefficient, y)
    dense, sparse = y.copy(), y.copy()
    matrix.axpy_listed(every, coefficient, dense)
    matrix.axpy_listed(firing, coefficient[firing], sparse)
    assert (np.abs(dense - expected) <= bound).all()
    np.testing.assert_array_equal(bits(dense), bits(sparse))


@each_isa
@pytest.mark.parametrize("kind", reference.TYPES)
def test_no_rows(isa: str, kind: str) -> None:
    matrix = kernels.Matrix(isa, int(reference.TYPES[kind]), 0, 64, np.empty(0, np.uint8))
    x = kernels.Vectors(isa, np.ones((2, 64), np.float32), int8=kind in reference.BLOCKED)
    none = np.empty(0, np.int32)
    assert matrix.dot(x, 0, 0).shape == (2, 0)
    assert matrix.dot_listed(none, x, 1).shape == (0,)
    y = np.full(64, 7, np.float32)
    matrix.axpy_listed(none, np.empty(0, np.float32), y)
    np.testing.assert_array_equal(y, 7)


@each_isa
@settings(max_examples=60, deadline=None)
@given(blocks=st.integers(1, 40), exponent=st.integers(-110, 100), seed=seeds)
def test_quantize_at_every_magnitude(isa: str, blocks: int, exponent: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = np.ldexp(rng.standard_normal(blocks * 32), exponent).astype(np.float32)
    x.reshape(-1, 32)[rng.random(blocks) < 0.2] = 0
    q, scale, total = kernels.quantize(isa, x)
    expected = reference.quantize(x[None])
    np.testing.assert_array_equal(q, expected.q[0][reference.packed_order(x.size)])
    np.testing.assert_array_equal(bits(scale), bits(expected.scale[0]))
    np.testing.assert_array_equal(total, expected.sum[0])


@each_isa
def test_f16_rounds_to_even_beside_every_halfway_point(isa: str) -> None:
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    halves = np.sort(halves[np.isfinite(halves)])
    halfway = (halves[:-1] + halves[1:]) / 2
    x = np.concatenate([halfway, *(np.nextafter(halfway, np.float32(side)) for side in (-np.inf, np.inf))])
    x = np.concatenate([x, np.array([65519, 65520, -65520, 1e9], np.float32)])
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(kernels.to_f16(isa, x), x.astype(np.float16).view(np.uint16))
