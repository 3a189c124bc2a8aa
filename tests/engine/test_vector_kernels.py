"""What each instruction set does with vectors alone, without weights: against numpy."""

import numpy as np
import pytest
from reference import kernels as reference

from turbosparse._native import kernels

LENGTHS = (0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 100, 1023)

isa = pytest.mark.parametrize("isa", kernels.available())


def normal(rng, n):
    return rng.standard_normal(n, dtype=np.float32)


@isa
@pytest.mark.parametrize("n", LENGTHS)
def test_positive(isa, n):
    rng = np.random.default_rng(n)
    x = normal(rng, n)
    x[rng.random(n) < 0.2] = 0
    x[rng.random(n) < 0.1] = -0.0
    x[rng.random(n) < 0.1] = np.nan
    x[rng.random(n) < 0.1] = 1e-42  # subnormal, but positive
    for values in (x, np.abs(normal(rng, n)) + 1, -np.abs(x)):
        values = np.ascontiguousarray(values, np.float32)
        np.testing.assert_array_equal(kernels.positive(isa, values), np.flatnonzero(values > 0))


@isa
def test_f16_both_ways_for_every_bit_pattern(isa):
    bits = np.arange(1 << 16, dtype=np.uint16)
    bits = bits[~np.isnan(bits.view(np.float16))]
    exact = bits.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(kernels.to_f16(isa, exact), bits)
    packed = kernels.Matrix(isa, int(reference.TYPES["f16"]), 1, len(bits), bits.view(np.uint8))
    np.testing.assert_array_equal(packed.decode_row(0), exact)


@isa
@pytest.mark.parametrize("n", LENGTHS)
def test_to_f16_rounds_to_nearest_even(isa, n):
    rng = np.random.default_rng(n)
    x = (normal(rng, n) * 10.0 ** rng.integers(-9, 6, n)).astype(np.float32)
    if n > 2:
        x[:3] = 1 + 2.0**-11, 1 + 3 * 2.0**-11, 65520
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16)
    np.testing.assert_array_equal(kernels.to_f16(isa, x), expected.view(np.uint16))


@isa
@pytest.mark.parametrize("n", LENGTHS[1:])
def test_exp_sum(isa, n):
    rng = np.random.default_rng(n)
    x = (normal(rng, n) * 30).astype(np.float32)
    x[rng.random(n) < 0.1] = -np.inf
    x[0] = x.max() if np.isfinite(x.max()) else 0.0
    top = np.float32(x.max())
    expected = np.exp((x - top).astype(np.float64))
    out = x.copy()
    total = kernels.exp_sum(isa, out, float(top))
    smallest = float(np.finfo(np.float32).smallest_normal)  # below, only the absolute error is bounded
    assert (np.abs(out - expected) <= 2 * 2.0**-23 * np.maximum(expected, smallest)).all()
    assert abs(total - out.astype(np.float64).sum()) <= n * 2.0**-24 * total * 1.01
    assert out[x == -np.inf].sum() == 0


@isa
@pytest.mark.parametrize("n", LENGTHS)
def test_maximum(isa, n):
    rng = np.random.default_rng(n)
    for x in (normal(rng, n), -1 - np.abs(normal(rng, n)), np.full(n, -np.inf, np.float32)):
        assert kernels.maximum(isa, x) == x.max(initial=-np.inf)


@isa
def test_exp_of_extremes(isa):
    x = np.array([-np.inf, -200, -104, -87.5, 0, 88.7, 89, 300, np.nan], np.float32)
    kernels.exp_sum(isa, x, 0.0)
    assert (x[:2] == 0).all() and 0 <= x[2] < 1e-44 and x[3] == pytest.approx(np.exp(-87.5), rel=1e-6) and x[4] == 1
    assert x[5] == pytest.approx(np.exp(np.float64(np.float32(88.7))), rel=3e-7)
    assert np.isinf(x[6:8]).all() and np.isnan(x[8])


@isa
@pytest.mark.parametrize("n", LENGTHS[1:])
def test_rms_norm(isa, n):
    rng = np.random.default_rng(n)
    x, weight, eps = normal(rng, n) * 3, normal(rng, n), 1e-5
    expected = x / np.sqrt((x.astype(np.float64) ** 2).mean() + eps) * weight
    assert (np.abs(kernels.rms_norm(isa, x, weight, eps) - expected) <= (n + 8) * 2.0**-24 * np.abs(expected)).all()


@isa
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("name", ["swiglu", "geglu"])
def test_gated_activations(isa, n, name):
    rng = np.random.default_rng(n)
    gate, up = normal(rng, n) * 4, normal(rng, n)
    gate[n // 2 :] *= 8
    expected = getattr(reference, name)(gate, up)
    out = getattr(kernels, name)(isa, gate, up)
    # exp of a rounded argument u errs by |u| 2^-24 of itself, which passes on where the sigmoid is steep or small.
    argument = np.abs(gate) if name == "swiglu" else 1.6 * np.abs(gate) * (1 + 0.045 * gate**2)
    bound = (8 + 4 * np.minimum(argument, 104)) * 2.0**-24 * np.abs(expected)
    # Where tanh is -1 but for rounding, float64's own reference has lost its digits.
    assert (np.abs(out - expected) <= bound + 1e-14 * np.abs(gate * up) + 1e-38).all()
