"""Each kernel of each instruction set that this machine has: against numpy, and against itself in other groupings."""

import re
from pathlib import Path

import numpy as np
import pytest
from reference import kernels as reference

from turbosparse._native import kernels

ISAS = kernels.available()
BLOCKED_COLS = (32, 64, 96, 160, 576, 1536)
PLAIN_COLS = (1, 2, 3, 5, 7, 33, 1023)
ROWS = (1, 2, 3, 5, 7, 33)
SHAPES = [
    (type, rows, cols)
    for type in reference.TYPES
    for cols in (BLOCKED_COLS if type in reference.BLOCKED else (*PLAIN_COLS, 64, 576))
    for rows in (ROWS if cols in (96, 33) else (7,))
]

isa = pytest.mark.parametrize("isa", ISAS)
shape = pytest.mark.parametrize(("type", "rows", "cols"), SHAPES)
blocked = pytest.mark.parametrize("type", reference.BLOCKED)


def case(isa, type, rows, cols, seed=0):
    rng = np.random.default_rng([seed, rows, cols])
    weights = reference.random_weights(rng, type, rows, cols)
    packed = kernels.Matrix(isa, int(reference.TYPES[type]), rows, cols, weights.raw.reshape(-1))
    return rng, weights, packed


def normal(rng, *shape):
    return rng.standard_normal(shape, dtype=np.float32)


def lists(rng, rows):
    """No row, all rows, and rows at random, ascending."""
    some = np.flatnonzero(rng.random(rows) < 0.4)
    return [chosen.astype(np.int32) for chosen in (np.arange(0), np.arange(rows), some)]


def same_bits(a, b):
    np.testing.assert_array_equal(np.asarray(a, np.float32).view(np.uint32), np.asarray(b, np.float32).view(np.uint32))


def int8_choices(type):
    return (False, True) if type in reference.BLOCKED else (False,)


def test_generic_comes_last():
    assert ISAS[-1] == "generic"
    assert len(set(ISAS)) == len(ISAS)


def test_every_instruction_set_of_this_processor_is_tested():
    """Linux names what the processor has; the tests of this folder run what `available` finds."""
    path = Path("/proc/cpuinfo")
    flags = set(re.findall(r"\w+", path.read_text())) if path.exists() else set()
    needed = {
        "avx2": {"avx2", "fma", "f16c"},
        "avxvnni": {"avx2", "fma", "f16c", "avx_vnni"},
        "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"},
        "neon": {"asimddp"},
    }
    if not flags & set().union(*needed.values()):
        pytest.skip("no list of what the processor has")
    assert set(ISAS) == {"generic"} | {name for name, flags_of in needed.items() if flags_of <= flags}


@isa
@shape
def test_decode_row_is_exact(isa, type, rows, cols):
    _, weights, packed = case(isa, type, rows, cols)
    for row in range(rows):
        np.testing.assert_array_equal(packed.decode_row(row), weights.values[row])


@isa
@shape
@pytest.mark.parametrize("count", [1, 3])
def test_dot_fp32(isa, type, rows, cols, count):
    rng, weights, packed = case(isa, type, rows, cols)
    x = normal(rng, count, cols)
    expected, bound = reference.dot(weights, x)
    out = packed.dot(kernels.Vectors(isa, x, int8=False), 0, rows)
    assert (np.abs(out - expected) <= bound).all()


@isa
@blocked
@pytest.mark.parametrize("cols", BLOCKED_COLS)
def test_dot_int8(isa, type, cols):
    rng, weights, packed = case(isa, type, 33, cols)
    x = normal(rng, 3, cols)
    out = packed.dot(kernels.Vectors(isa, x, int8=True), 0, 33)
    expected, bound = reference.dot_int8(weights, x)
    assert (np.abs(out - expected) <= bound).all()
    # And the activations' rounding moves the product by half a step a column at most.
    exact, rounding = reference.dot(weights, x)
    step = np.repeat(reference.quantize(x).scale, reference.BLOCK, axis=1) * 0.501
    assert (np.abs(out - exact) <= bound + rounding + step @ np.abs(weights.values).T).all()


@isa
@blocked
@pytest.mark.parametrize("cols", BLOCKED_COLS)
def test_two_terms_are_multiplied_in_one_pass(isa, type, cols):
    """The second term is what int8 blocks lost of x: with it the product is that of x to some 15 bits."""
    rng, weights, packed = case(isa, type, 33, cols)
    x = normal(rng, 3, cols)
    first = reference.quantize(x)
    lost = x - np.repeat(first.scale, reference.BLOCK, axis=1) * first.q
    out = packed.dot(kernels.Vectors(isa, x, int8=True, rest=lost), 0, 33)
    parts = [reference.dot_int8(weights, term) for term in (x, lost)]
    # AVX2 puts the terms together to words, whose step is a 256th of the first term's.
    step = np.repeat(first.scale, reference.BLOCK, axis=1) / 256 * 0.501 * (isa == "avx2" and type == "q8_0")
    joined = step @ np.abs(weights.values).T
    assert (np.abs(out - sum(part[0] for part in parts)) <= 1.1 * sum(part[1] for part in parts) + joined).all()
    for v in range(3):
        alone = kernels.Vectors(isa, x[v : v + 1], int8=True, rest=lost[v : v + 1])
        same_bits(packed.dot(alone, 0, 33)[0], out[v])
        chosen = np.flatnonzero(rng.random(33) < 0.4).astype(np.int32)
        same_bits(packed.dot_listed(chosen, alone, 0), out[v, chosen])


@isa
@blocked
def test_dot_int8_of_the_largest_quants_does_not_saturate(isa, type):
    cols = 576
    raw = np.zeros((2, cols // 32, reference.BLOCK_BYTES[type]), np.uint8)
    raw[:, :, :2] = np.frombuffer(np.float16(1).tobytes(), np.uint8)
    raw[0, :, 2:], raw[1, :, 2:] = {"q4_0": (0x00, 0xFF), "q8_0": (0x80, 0x7F)}[type]
    packed = kernels.Matrix(isa, int(reference.TYPES[type]), 2, cols, raw.reshape(-1))
    quants = {"q4_0": (-8, 7), "q8_0": (-128, 127)}[type]
    for value in (127.0, -127.0):
        x = kernels.Vectors(isa, np.full((1, cols), value, np.float32), int8=True)
        np.testing.assert_array_equal(packed.dot(x, 0, 2)[0], [quant * value * cols for quant in quants])


@isa
def test_two_terms_of_the_largest_quants_do_not_saturate(isa):
    cols = 576
    raw = np.zeros((2, cols // 32, reference.BLOCK_BYTES["q8_0"]), np.uint8)
    raw[:, :, :2] = np.frombuffer(np.float16(1).tobytes(), np.uint8)
    raw[0, :, 2:], raw[1, :, 2:] = 0x80, 0x7F
    packed = kernels.Matrix(isa, int(reference.TYPES["q8_0"]), 2, cols, raw.reshape(-1))
    for value in (127.0, -127.0):
        x = kernels.Vectors(
            isa, np.full((5, cols), value, np.float32), int8=True, rest=np.full((5, cols), value / 256, np.float32)
        )
        expected = [quant * value * (1 + 1 / 256) * cols for quant in (-128, 127)]
        np.testing.assert_allclose(packed.dot(x, 0, 2), np.tile(expected, (5, 1)), rtol=2e-5)


@isa
@shape
def test_dot_is_the_same_in_any_split_of_rows(isa, type, rows, cols):
    rng, _, packed = case(isa, type, rows, cols)
    for int8 in int8_choices(type):
        for count in (1, 5):
            x = kernels.Vectors(isa, normal(rng, count, cols), int8=int8)
            whole = packed.dot(x, 0, rows)
            assert packed.dot(x, rows, rows).shape == (count, 0)
            for cut in {1, rows // 2, rows - 1}:
                same_bits(packed.dot(x, 0, cut), whole[:, :cut])
                same_bits(packed.dot(x, cut, rows), whole[:, cut:])


@isa
@shape
def test_listed_rows_equal_a_range(isa, type, rows, cols):
    rng, _, packed = case(isa, type, rows, cols)
    for int8 in int8_choices(type):
        x = kernels.Vectors(isa, normal(rng, 3, cols), int8=int8)
        whole = packed.dot(x, 0, rows)
        for chosen in lists(rng, rows):
            for v in range(3):
                same_bits(packed.dot_listed(chosen, x, v), whole[v, chosen])


@isa
@pytest.mark.parametrize(
    ("type", "cols"),
    [
        ("q4_0", 96),
        ("q4_0", 1536),
        ("q4_0", 2080),
        ("q8_0", 576),
        ("q8_0", 1536),
        ("f16", 33),
        ("f16", 576),
        ("f32", 64),
    ],
)
@pytest.mark.parametrize("count", [2, 3, 4, 5, 7, 8, 9, 17, 33])
def test_many_vectors_equal_one_at_a_time(isa, type, cols, count):
    rng, _, packed = case(isa, type, 33, cols)
    x = normal(rng, count, cols)
    for int8 in int8_choices(type):
        together = packed.dot(kernels.Vectors(isa, x, int8=int8), 0, 33)
        for v in range(count):
            same_bits(together[v], packed.dot(kernels.Vectors(isa, x[v : v + 1], int8=int8), 0, 33)[0])


@isa
@pytest.mark.parametrize(("type", "cols"), [("q4_0", 28672), ("q8_0", 14336), ("f16", 8193), ("f32", 8192)])
def test_rows_that_share_a_long_vector_have_the_bits_of_each_alone(isa, type, cols):
    """A vector that the first-level cache does not hold meets four rows at a time."""
    rng, weights, packed = case(isa, type, 7, cols)
    x, lost = normal(rng, 1, cols), normal(rng, 1, cols) / 256
    for int8 in int8_choices(type):
        vectors = kernels.Vectors(isa, x, int8=int8, rest=lost if int8 else None)
        together = packed.dot(vectors, 0, 7)
        for row in range(7):
            same_bits(together[:, row : row + 1], packed.dot(vectors, row, row + 1))
    expected, bound = reference.dot(weights, x)
    assert (np.abs(packed.dot(kernels.Vectors(isa, x, int8=False), 0, 7) - expected) <= bound).all()


@isa
@shape
def test_axpy(isa, type, rows, cols):
    rng, weights, packed = case(isa, type, rows, cols)
    for chosen in lists(rng, rows):
        coefficient, y = normal(rng, len(chosen)), normal(rng, cols)
        expected, bound = reference.axpy(weights, chosen, coefficient, y)
        out = y.copy()
        packed.axpy_listed(chosen, coefficient, out)
        assert (np.abs(out - expected) <= bound).all()


@isa
@shape
def test_axpy_of_a_list_equals_row_by_row(isa, type, rows, cols):
    rng, _, packed = case(isa, type, rows, cols)
    for chosen in lists(rng, rows):
        coefficient, together = normal(rng, len(chosen)), normal(rng, cols)
        single = together.copy()
        packed.axpy_listed(chosen, coefficient, together)
        for i in range(len(chosen)):
            packed.axpy_listed(chosen[i : i + 1], coefficient[i : i + 1], single)
        same_bits(together, single)


@isa
@shape
def test_a_coefficient_of_zero_changes_nothing(isa, type, rows, cols):
    """The promise behind exact sparsity: skipping a neuron whose h is zero gives the bits of not skipping it."""
    rng, _, packed = case(isa, type, rows, cols)
    every = np.arange(rows, dtype=np.int32)
    coefficient = normal(rng, rows)
    coefficient[rng.random(rows) < 0.5] = 0
    coefficient[-1] = -0.0
    dense = normal(rng, cols)
    sparse = dense.copy()
    packed.axpy_listed(every, coefficient, dense)
    firing = np.flatnonzero(coefficient).astype(np.int32)
    packed.axpy_listed(firing, coefficient[firing], sparse)
    same_bits(dense, sparse)


BLOCKED_SHAPES = [shape for shape in SHAPES if shape[0] in reference.BLOCKED]
blocked_shape = pytest.mark.parametrize(("type", "rows", "cols"), BLOCKED_SHAPES)


@isa
@blocked_shape
def test_sum_in_integers(isa, type, rows, cols):
    """Against float64, with the bound of rounded levels; and every instruction set has the bits of the generic one."""
    rng, weights, packed = case(isa, type, rows, cols)
    _, _, generic = case("generic", type, rows, cols)
    for chosen in lists(rng, rows):
        coefficient, y = normal(rng, len(chosen)), normal(rng, cols)
        expected, bound = reference.level_sum(weights, chosen, coefficient, rows, y)
        out, same = y.copy(), y.copy()
        packed.sum_listed(chosen, coefficient, rows, out)
        generic.sum_listed(chosen, coefficient, rows, same)
        assert (np.abs(out - expected) <= bound).all()
        same_bits(out, same)


@isa
@blocked_shape
@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_sums_for_several_vectors_are_those_of_lists_without_the_zeros(isa, type, rows, cols, count):
    rng, _, packed = case(isa, type, rows, cols)
    first, last = rows // 3, rows
    coefficient = normal(rng, count, last - first)
    coefficient[rng.random(coefficient.shape) < 0.6] = 0
    coefficient[0] = 0  # nothing fires
    together = packed.sum_rows(first, last, coefficient)
    for v in range(count):
        firing = np.flatnonzero(coefficient[v]).astype(np.int32)
        alone = np.zeros(cols, np.float32)
        packed.sum_listed(firing + np.int32(first), coefficient[v][firing], last - first, alone)
        same_bits(together[v], alone)


@isa
@blocked
@pytest.mark.parametrize("rows", [3, 257, 8192])
def test_sums_of_the_largest_quants_stay_within_their_integers(isa, type, rows):
    quants = np.full((rows, 32), -128 if type == "q8_0" else 0, np.int8).view(np.uint8)
    quants = quants if type == "q8_0" else quants[:, :16]
    raw = np.concatenate([np.full((rows, 1), 0.5, np.float16).view(np.uint8), quants], axis=1)
    packed = kernels.Matrix(isa, int(reference.TYPES[type]), rows, 32, np.ascontiguousarray(raw).reshape(-1))
    value = -(128 if type == "q8_0" else 8) * 0.5 * rows
    out = packed.sum_rows(0, rows, np.ones((1, rows), np.float32))
    np.testing.assert_allclose(out, np.full((1, 32), value), rtol=1e-3)


@isa
@blocked
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_poisoned_coefficient_shows_in_its_sum_alone(isa, type, poison):
    rng, _, packed = case(isa, type, 7, 96)
    coefficient = normal(rng, 3, 7)
    clean = packed.sum_rows(0, 7, coefficient)
    coefficient[1, 4] = poison
    poisoned = packed.sum_rows(0, 7, coefficient)
    assert not np.isfinite(poisoned[1]).any()
    same_bits(poisoned[[0, 2]], clean[[0, 2]])


@isa
@pytest.mark.parametrize("cols", (*BLOCKED_COLS, 1024, 992))
def test_quantize(isa, cols):
    rng = np.random.default_rng(cols)
    x = normal(rng, cols) * np.repeat(np.float32(10) ** rng.integers(-20, 20, cols // 32), 32).astype(np.float32)
    x[-32:] = np.arange(32) % 4 + 0.5  # ties
    x[-32] = 127
    if cols > 64:
        x[:32] = 0
        x[32:64] = 1e-42
    q, scale, total = kernels.quantize(isa, x)
    expected = reference.quantize(x[None])
    np.testing.assert_array_equal(scale, expected.scale[0])
    np.testing.assert_array_equal(total, expected.sum[0])
    np.testing.assert_array_equal(q, expected.q[0][reference.packed_order(cols)])


@isa
@blocked
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_poisoned_activation_shows_in_every_product(isa, type, poison):
    rng, _, packed = case(isa, type, 7, 96)
    x = normal(rng, 1, 96)
    x[0, 40] = poison
    assert not np.isfinite(packed.dot(kernels.Vectors(isa, x, int8=True), 0, 7)).any()


def test_wrong_sizes_are_refused():
    isa = ISAS[-1]
    _, weights, packed = case(isa, "q4_0", 3, 64)
    x = kernels.Vectors(isa, np.zeros((1, 64), np.float32), int8=True)
    one = np.zeros(1, np.float32)
    with pytest.raises(ValueError, match="instruction set"):
        kernels.quantize("none", np.zeros(32, np.float32))
    with pytest.raises(ValueError):
        kernels.Matrix(isa, int(reference.TYPES["q4_0"]), 3, 65, weights.raw.reshape(-1))
    with pytest.raises(ValueError):
        kernels.Matrix(isa, int(reference.TYPES["q4_0"]), 4, 64, weights.raw.reshape(-1))
    with pytest.raises(ValueError):
        packed.dot(x, 0, 4)
    with pytest.raises(ValueError):
        packed.dot_listed(np.array([3], np.int32), x, 0)
    with pytest.raises(ValueError):
        packed.axpy_listed(np.array([0], np.int32), one, one)
    with pytest.raises(ValueError):
        packed.decode_row(3)
