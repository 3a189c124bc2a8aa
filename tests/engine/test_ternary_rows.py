"""Rows of three values: written with one scale, found in q4_0 and q8_0, multiplied with 2 bits a weight."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from agreement import TOKENS, check_same_bits, equal_bits, logits_error
from factories import make_ternary_folder
from reference import kernels as reference

from turbosparse._native import isas, kernels
from turbosparse.engine import Engine
from turbosparse.model.export import export_gguf
from turbosparse.model.quantize import dequantize, quantize
from turbosparse.relufy.ternary import ternary

ISAS = kernels.available()
COLS = (32, 64, 96, 160, 576, 1536)  # groups of 16, 8, 4, 2 and 1 blocks
isa = pytest.mark.parametrize("isa", ISAS)
source = pytest.mark.parametrize("source", reference.BLOCKED)


def ternary_rows(rng, source, rows, cols, quant):
    """Weights of -s, 0 and s; the first row is all zeros, the last has a scale below zero."""
    quants = quant * rng.integers(-1, 2, (rows, cols // 32, 32))
    quants[0] = 0
    scales = np.abs(rng.standard_normal((rows, 1, 1))).astype(np.float16) * np.float16(0.05)
    scales[-1] *= -1
    blocks = np.empty((rows, cols // 32, reference.BLOCK_BYTES[source]), np.uint8)
    blocks[:, :, :2] = np.broadcast_to(scales, (rows, cols // 32, 1)).copy().view(np.uint8)
    if source == "q8_0":
        blocks[:, :, 2:] = quants.astype(np.int8).view(np.uint8)
    else:
        nibbles = (quants + 8).astype(np.uint8)
        blocks[:, :, 2:] = nibbles[:, :, :16] | nibbles[:, :, 16:] << 4
    raw = blocks.reshape(rows, -1)
    values = gguf.quants.dequantize(raw, reference.TYPES[source]).astype(np.float32).reshape(rows, cols)
    return reference.Weights(source, raw, values)


def pack(isa, weights):
    rows, cols = weights.values.shape
    return kernels.Matrix(isa, int(reference.TYPES[weights.type]), rows, cols, weights.raw.reshape(-1), ternary=True)


def normal(rng, *shape):
    return rng.standard_normal(shape, dtype=np.float32)


@isa
@source
@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize("quant", [1, 7])
def test_products_are_those_of_the_rows_in_the_file(isa, source, cols, quant):
    rng = np.random.default_rng([cols, quant])
    weights = ternary_rows(rng, source, 33, cols, quant)
    packed = pack(isa, weights)
    assert packed.row_bytes == 4 + cols // 4
    x, lost = normal(rng, 3, cols), normal(rng, 3, cols) / 256
    expected, bound = reference.dot_int8(weights, x)
    assert (np.abs(packed.dot(kernels.Vectors(isa, x, int8=True), 0, 33) - expected) <= bound).all()
    both = packed.dot(kernels.Vectors(isa, x, int8=True, rest=lost), 0, 33)
    second, more = reference.dot_int8(weights, lost)
    assert (np.abs(both - expected - second) <= 2 * (bound + more)).all()


@isa
@pytest.mark.parametrize("cols", (*COLS, 17 * 1024))
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 17])
def test_an_element_has_the_same_bits_in_any_company(isa, cols, count):
    rng = np.random.default_rng([cols, count])
    packed = pack(isa, ternary_rows(rng, "q4_0", 13, cols, 7))
    x, lost = normal(rng, count, cols), normal(rng, count, cols) / 256
    for rest in (None, lost):
        vectors = kernels.Vectors(isa, x, int8=True, rest=rest)
        together = packed.dot(vectors, 0, 13)
        for rows in (np.arange(0), np.arange(13), np.flatnonzero(rng.random(13) < 0.4)):
            listed = packed.dot_listed(rows.astype(np.int32), vectors, count - 1)
            assert equal_bits(listed, together[count - 1, rows])
        for v in range(count):
            alone = kernels.Vectors(isa, x[v : v + 1], int8=True, rest=None if rest is None else rest[v : v + 1])
            for row in range(13):
                assert equal_bits(packed.dot(alone, row, row + 1), together[v : v + 1, row : row + 1])


@isa
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_what_is_no_number_shows(isa, poison):
    rng = np.random.default_rng(0)
    packed = pack(isa, ternary_rows(rng, "q4_0", 5, 96, 7))
    x = normal(rng, 1, 96)
    x[0, 40] = poison
    assert np.isnan(packed.dot(kernels.Vectors(isa, x, int8=True), 0, 5)).all()


@source
@pytest.mark.parametrize("change", ["quant", "scale", "infinite"])
@pytest.mark.parametrize("row", [0, 6])
@pytest.mark.parametrize("block", [0, 2])
def test_rows_with_a_fourth_value_are_refused(source, change, row, block):
    weights = ternary_rows(np.random.default_rng(1), source, 7, 96, 5)
    blocks = weights.raw.reshape(7, 3, -1)
    blocks[row, :, 2] = 0x8D if source == "q4_0" else 5  # all blocks of the row hold an s
    pack(ISAS[-1], weights)
    if change == "quant":
        blocks[row, block, 3] = 0x8B if source == "q4_0" else 3
    else:
        blocks[row, block, :2] = np.array([np.inf if change == "infinite" else 0.25], np.float16).view(np.uint8)
    with pytest.raises(ValueError, match="not ternary"):
        pack(ISAS[-1], weights)


def test_only_products_with_int8_vectors_are_offered():
    rng = np.random.default_rng(2)
    packed = pack(ISAS[0], ternary_rows(rng, "q4_0", 3, 64, 7))
    one = np.zeros(1, np.int32)
    for refused in (
        lambda: packed.dot(kernels.Vectors(ISAS[0], normal(rng, 1, 64), int8=False), 0, 3),
        lambda: packed.axpy_listed(one, np.ones(1, np.float32), np.zeros(64, np.float32)),
        lambda: packed.sum_listed(one, np.ones(1, np.float32), 3, np.zeros(64, np.float32)),
        lambda: packed.decode_row(0),
    ):
        with pytest.raises(ValueError):
            refused()


@source
@pytest.mark.parametrize("cols", [32, 576])
def test_trained_rows_are_written_as_what_the_engine_looks_for(source, cols):
    rows = ternary(torch.randn(200, cols, generator=torch.Generator().manual_seed(cols))).numpy()
    raw = quantize(rows, reference.TYPES[source])
    values = dequantize(raw.reshape(-1), reference.TYPES[source], rows.shape)
    np.testing.assert_allclose(values, rows, rtol=2**-10)
    pack(ISAS[0], reference.Weights(source, raw, values))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny dReLU model whose gates are ternary, as Q4_0 and Q8_0."""
    folder = tmp_path_factory.mktemp("ternary")
    source = make_ternary_folder(folder / "plain")
    paths = {quant: folder / f"{quant}.gguf" for quant in ("q4_0", "q8_0")}
    for quant, path in paths.items():
        export_gguf(source, path, quant)
    return paths


@pytest.mark.parametrize("quant", ["q4_0", "q8_0"])
@pytest.mark.parametrize("isa", isas())
def test_a_model_computes_the_same_in_every_mode(files, quant, isa):
    check_same_bits(files[quant], isa, (1, 2, 3))
    fast, exact = (Engine.load(files[quant], isa=isa, compute=compute) for compute in ("int8", "f32"))
    error = logits_error(fast.session().logits(TOKENS), exact.session().logits(TOKENS))
    assert 0 < error.max() < 0.1
