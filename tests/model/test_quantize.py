"""Our encodings are ggml's bytes with errors as small as the format allows; decoding equals the `gguf` package's."""

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from turbosparse.errors import UserError
from turbosparse.model import quantize as module
from turbosparse.model.gguf import GGUFTensor, nbytes_of
from turbosparse.model.quantize import (
    NEGATABLE,
    WRITABLE,
    dequantize,
    dequantize_rows,
    negate,
    quantize,
    row_chunks,
    writable_type,
)

Type = GGMLQuantizationType
# Types that the dense files use, which are decoded once at load.
READABLE = [*WRITABLE, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q4_K, Type.Q5_K, Type.Q6_K]


def _normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _round_trip(array, kind):
    return dequantize(quantize(array, kind).reshape(-1), kind, array.shape)


@pytest.mark.parametrize("kind", sorted(WRITABLE))
def test_an_encoded_array_is_what_the_gguf_package_decodes(kind):
    array = _normal((5, 96))
    encoded = quantize(array, kind)
    assert encoded.dtype == np.uint8 and encoded.size == nbytes_of(kind, array.shape)
    np.testing.assert_array_equal(quants.dequantize(encoded, kind), _round_trip(array, kind))


@pytest.mark.parametrize("kind", sorted(NEGATABLE))
def test_the_other_sign_is_exact(kind):
    encoded = quantize(_normal((5, 96)), kind)
    before = encoded.copy()
    values, negated = (dequantize(rows.reshape(-1), kind, (5, 96)) for rows in (encoded, negate(encoded, kind)))
    assert np.array_equal(negated, -values) and values.any() and np.array_equal(encoded, before)


@pytest.mark.parametrize(("kind", "bound"), [(Type.F32, 0), (Type.F16, 3e-4), (Type.BF16, 2e-3), (Type.Q8_0, 6e-3)])
def test_the_error_is_that_of_the_format(kind, bound):
    array = _normal((64, 256))
    assert np.linalg.norm(_round_trip(array, kind) - array) <= bound * np.linalg.norm(array)


@pytest.mark.parametrize("seed", range(3))
def test_q4_0_beats_the_scale_of_the_largest_entry(seed):
    """llama.cpp's rounding, as the gguf package has it, is one of those that are tried: no block may be worse."""
    array = _normal((64, 512), seed) * np.exp(_normal((64, 1), seed + 9))
    ours = _round_trip(array, Type.Q4_0)
    theirs = quants.dequantize(quants.quantize(array, Type.Q4_0), Type.Q4_0)
    error, reference = (((x - array).reshape(-1, 32) ** 2).sum(axis=1) for x in (ours, theirs))
    # The scale is stored in half precision, which moves an error by a fraction of a percent.
    assert (error <= reference * 1.01).all()
    assert error.sum() < 0.9 * reference.sum()


def test_q4_0_keeps_what_it_can_hold_exactly():
    levels = np.concatenate([np.arange(-8, 8), np.arange(-8, 8)]).astype(np.float32)
    array = np.stack([levels, -0.25 * levels, np.zeros(32, np.float32), levels * 2.0**-10])
    np.testing.assert_array_equal(_round_trip(array, Type.Q4_0), array)


@settings(max_examples=200, deadline=None)
@given(
    hnp.arrays(np.float32, (2, 64), elements=st.floats(-6e4, 6e4, width=32)),
    st.sampled_from([Type.Q4_0, Type.Q8_0, Type.F16, Type.BF16]),
)
def test_no_finite_array_gets_worse_than_a_step(array, kind):
    found = _round_trip(array, kind)
    assert np.isfinite(found).all()
    blocks, errors = np.abs(array).reshape(-1, 32).max(axis=1), np.abs(found - array).reshape(-1, 32)
    # Scales below half precision's smallest number are lost, whoever encodes.
    if kind is Type.Q4_0:
        # The scale with the least squared error may spend more than a step on one entry, but never on the block more
        # than the scale of the largest entry can: half a step on each, a whole one where +8 steps are cut to +7.
        assert (
            np.sqrt(np.square(errors, dtype=np.float64).sum(axis=1)) <= np.sqrt(32) * blocks / 8 * 1.01 + 1e-2
        ).all()
    else:
        step = {Type.Q8_0: 1 / 127, Type.F16: 2.0**-10, Type.BF16: 2.0**-7}[kind]
        assert (errors.max(axis=1) <= blocks * step + 1e-3).all()


@pytest.mark.parametrize("size", [1.5e-38, 1e-45, 1e-31])
def test_a_block_too_small_for_its_scale_becomes_zero(size):
    """The inverse of its largest entry overflowed, and its zeros became NaN on the way to a nibble."""
    array = np.zeros((1, 32), np.float32)
    array[0, 3] = size
    with np.errstate(over="raise", invalid="raise"):
        assert not _round_trip(array, Type.Q4_0).any()


def test_one_large_entry_may_cost_more_than_a_step_of_its_block():
    """Found by hypothesis: 31 equal entries outweigh the one that is seventeen times as large."""
    array = np.full((1, 32), 433, np.float32)
    array[0, 0] = 7279
    ours = _round_trip(array, Type.Q4_0)
    theirs = quants.dequantize(quants.quantize(array, Type.Q4_0), Type.Q4_0)
    assert abs(ours - array).max() > 7279 / 7
    assert np.square(ours - array).sum() < np.square(theirs - array).sum()


@pytest.mark.parametrize("kind", READABLE)
def test_rows_in_chunks_are_the_whole(kind, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1024)
    block, size = GGML_QUANT_SIZES[kind]
    shape = (9, 512)
    raw = np.random.default_rng(1).integers(0, 256, nbytes_of(kind, shape), dtype=np.uint8)
    if block > 1:
        # Random bytes as scales could be NaN; any float16 with a small exponent is a scale.
        raw.reshape(-1, size)[:] &= 0x3B
    with np.errstate(all="ignore"):
        whole = quants.dequantize(raw.reshape(9, -1), kind)
    np.testing.assert_array_equal(dequantize(raw, kind, shape), whole)
    tensor = GGUFTensor("x", kind, shape, raw)
    np.testing.assert_array_equal(dequantize_rows(tensor, 2, 7), whole[2:7])
    assert dequantize_rows(tensor, 3, 3).shape == (0, 512)


@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (1, 1), (7, 100_000), (3, 1 << 20)])
def test_chunks_cover_all_rows_once(rows, columns):
    covered = [row for start, stop in row_chunks(rows, columns) for row in range(start, stop)]
    assert covered == list(range(rows))


def test_leading_dimensions_are_kept():
    array = _normal((2, 3, 64))
    assert quantize(array, Type.Q8_0).shape == (2, 3, 68)
    np.testing.assert_allclose(_round_trip(array, Type.Q8_0), array, atol=0.03)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("kind", sorted(WRITABLE))
def test_what_is_not_finite_is_refused(kind, bad):
    array = _normal((4, 64))
    array[3, 63] = bad
    with pytest.raises(ValueError, match="infinities or NaNs"):
        quantize(array, kind)


def test_what_cannot_be_encoded_is_refused():
    with pytest.raises(ValueError, match="F16"):
        quantize(np.full((1, 32), 7e4, np.float32), Type.F16)
    with pytest.raises(ValueError, match="blocks of 32"):
        quantize(np.zeros((1, 33), np.float32), Type.Q4_0)
    with pytest.raises(ValueError, match="Q4_K"):
        quantize(np.zeros((1, 256), np.float32), Type.Q4_K)


def test_what_cannot_be_decoded_is_refused():
    with pytest.raises(ValueError, match="bytes"):
        dequantize(np.zeros(17, np.uint8), Type.Q4_0, (1, 32))
    with pytest.raises(UserError, match="Q8_K"):
        dequantize(np.zeros(nbytes_of(Type.Q8_K, (1, 256)), np.uint8), Type.Q8_K, (1, 256))


def test_rows_of_odd_length_stay_writable():
    assert writable_type(Type.Q4_0, 64) is Type.Q4_0
    assert writable_type(Type.Q4_0, 72) is Type.F16
    assert writable_type(Type.F32, 7) is Type.F32
