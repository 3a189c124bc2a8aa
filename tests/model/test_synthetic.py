"""Models with random weights: as sparse as asked, in the engine and in numbers, and whole files."""

import dataclasses
import tracemalloc

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from turbosparse.engine import Engine, SamplingParams
from turbosparse.errors import UserError
from turbosparse.model.config import ModelConfig
from turbosparse.model.gguf import GGUFFile
from turbosparse.model.quantize import dequantize
from turbosparse.model.shapes import SHAPES, shape_config
from turbosparse.model.synthetic import Rates, measure_rates, rates_for, write_synthetic
from turbosparse.model.synthetic_predictor import Prediction, predictor_ranks
from turbosparse.model.synthetic_rows import Rows, few_levels, random_rows


def decode(engine: Engine, count: int, mode: str) -> list[int]:
    session = engine.session(256)
    session.prefill(engine.tokenizer.encode("Once upon a time"), mode)
    tokens = []
    for _ in range(count):
        tokens.append(session.sample(SamplingParams()))
        session.decode(tokens[-1], mode)
    return tokens


@pytest.mark.parametrize("quant", ["q4_0", "q8_0", "f16"])
@pytest.mark.parametrize(("sparsity", "gate_rate"), [(0.9, 0.25), (0.95, 0.1), (0.6, 0.5)])
def test_the_engine_finds_the_sparsity_that_was_asked_for(tmp_path, quant, sparsity, gate_rate):
    out = tmp_path / "model.gguf"
    rates = rates_for(sparsity, gate_rate)
    size = write_synthetic(out, "small", shape_config("smollm2-135m", "drelu", layers=3), rates, quant)
    assert size == out.stat().st_size and list(tmp_path.iterdir()) == [out]
    measured = measure_rates(out)
    for name in ("gate", "up", "h"):
        assert getattr(measured, name) == pytest.approx(getattr(rates, name), abs=0.015)
    engine = Engine.load(out)
    assert engine.config.synthetic
    engine.traffic(reset=True)
    tokens = decode(engine, 48, "exact")
    assert engine.traffic().sparsity == pytest.approx(sparsity, abs=0.02)
    assert len(set(tokens)) > 8  # the text does not stand still, so the active set moves
    assert decode(engine, 48, "dense") == tokens


def test_active_sets_vary_per_token(tmp_path):
    write_synthetic(tmp_path / "m.gguf", "m", shape_config("smollm2-135m", "drelu", 2), rates_for(0.9, 0.25), "q4_0")
    engine = Engine.load(tmp_path / "m.gguf")
    engine.count_activations(True)
    session = engine.session(128)
    session.prefill(list(range(300, 400)), "dense")
    h = engine.counters().h
    assert np.median(h) == pytest.approx(10, abs=2)  # of 100 tokens each neuron fires for about ten
    assert (h < 40).mean() > 0.99


@pytest.mark.parametrize(("quant", "selected"), [("q4_0", 1.2), ("q8_0", 1.5), ("f16", 1.0)])
def test_predictors_select_and_cost_what_was_asked_for(tmp_path, quant, selected):
    out, share = tmp_path / "model.gguf", 0.06
    config = shape_config("smollm2-135m", "drelu", layers=5)
    write_synthetic(out, "m", config, rates_for(0.9, 0.25), quant, prediction=Prediction(selected, share))
    measured = measure_rates(out)
    assert (measured.gate, measured.up, measured.h) == pytest.approx((0.25, 0.4, 0.1), abs=0.025)
    assert measured.selected == pytest.approx(selected, rel=0.05)
    assert measured.recall > (0.95 if selected > 1.1 else 0.85)
    with GGUFFile.open(out) as file:
        sizes = {name: tensor.data.size for name, tensor in file.tensors.items()}
    predictors = sum(size for name, size in sizes.items() if ".fc" in name)
    ffns = sum(size for name, size in sizes.items() if ".ffn_" in name and "norm" not in name)
    assert predictors / ffns == pytest.approx(share, rel=0.03)
    engine = Engine.load(out)
    assert engine.modes == ("dense", "exact", "predicted")
    engine.count_activations(True)
    engine.session(128).logits(list(range(300, 400)), "predicted")
    counts = engine.counters()
    assert counts.selected.sum() / counts.h.sum() == pytest.approx(selected, rel=0.07)
    assert counts.hit.sum() / counts.h.sum() == pytest.approx(measured.recall, abs=0.04)
    often = counts.selected[2]  # of a layer in the middle: which neurons are selected depends on the token
    assert np.median(often) == pytest.approx(10 * selected, abs=3) and (often < 45).mean() > 0.99


@pytest.mark.parametrize("prediction", [None, Prediction(1.2, 0.06)])
@pytest.mark.parametrize("group", [2, 3])
def test_neurons_that_share_gates_are_as_sparse_as_asked(tmp_path, group, prediction):
    out = tmp_path / "model.gguf"
    config = shape_config("smollm2-135m", "drelu", 3, neurons_per_gate=group)
    write_synthetic(out, "m", config, rates_for(0.9, 0.25), "q4_0", prediction=prediction)
    measured = measure_rates(out)
    assert (measured.gate, measured.up, measured.h) == pytest.approx((0.25, 0.4, 0.1), abs=0.03)
    engine = Engine.load(out)
    assert engine.config.neurons_per_gate == group
    engine.count_activations(True)
    engine.session(128).logits(list(range(300, 400)), "exact")
    counts = engine.counters()
    assert counts.h.sum() / counts.h.size / 100 == pytest.approx(0.1, abs=0.02)
    if prediction is not None:
        assert measured.selected == pytest.approx(1.2, rel=0.07) and measured.recall > 0.93
        assert counts.hit.sum() / counts.h.sum() == pytest.approx(measured.recall, abs=0.05)
        with GGUFFile.open(out) as file:
            sizes = {name: tensor.data.size for name, tensor in file.tensors.items()}
        ffns = sum(size for name, size in sizes.items() if ".ffn_" in name and "norm" not in name)
        share = sum(size for name, size in sizes.items() if ".fc" in name) / ffns
        assert share == pytest.approx(0.06, rel=0.15)  # ranks are multiples of 32


@pytest.mark.parametrize("prediction", [None, Prediction(1.2, 0.06)])
@pytest.mark.parametrize(("group", "quant"), [(2, "q4_0"), (4, "q8_0"), (2, "f16")])
def test_of_neurons_with_mirrored_ups_a_half_of_the_open_ones_fires(tmp_path, group, quant, prediction):
    out = tmp_path / "model.gguf"
    config = shape_config("smollm2-135m", "drelu", 3, group, mirrored_ups=True)
    write_synthetic(out, "m", config, rates_for(None, 0.24, mirrored_ups=True), quant, prediction=prediction)
    measured = measure_rates(out)
    assert (measured.gate, measured.up, measured.h) == pytest.approx((0.24, 0.5, 0.12), abs=0.03)
    assert measured.h == pytest.approx(measured.gate / 2, rel=1e-3)
    engine = Engine.load(out)
    assert engine.config.mirrored_ups and engine.config.neurons_per_gate == group
    engine.count_activations(True)
    engine.session(128).logits(list(range(300, 400)), "exact")
    counts = engine.counters()
    assert counts.h.sum() / counts.h.size / 100 == pytest.approx(measured.h, abs=0.02)
    assert counts.up[:, ::2].mean() / 100 == pytest.approx(0.5, abs=0.02)  # of random ups, either sign is as likely
    if prediction is not None:
        assert measured.selected == pytest.approx(1.2, rel=0.07) and measured.recall > 0.93
        assert counts.selected.sum() / counts.h.sum() == pytest.approx(measured.selected, rel=0.07)
        assert counts.hit.sum() / counts.h.sum() == pytest.approx(measured.recall, abs=0.05)
        with GGUFFile.open(out) as file:
            sizes = {name: tensor.data.size for name, tensor in file.tensors.items()}
        ffns = sum(size for name, size in sizes.items() if ".ffn_" in name and "norm" not in name)
        share = sum(size for name, size in sizes.items() if ".fc" in name) / ffns
        assert share == pytest.approx(0.06, rel=0.25)  # ranks are multiples of 32


def mixture(activation: str = "drelu", **changes) -> ModelConfig:
    """The shape of a Mixtral, small."""
    config = shape_config("mixtral-47b", activation, layers=2)
    sizes = {"hidden_size": 256, "ffn_size": 640, "n_heads": 4, "n_kv_heads": 2, "head_dim": 64, "vocab_size": 2048}
    return dataclasses.replace(config, **(sizes | changes))


@pytest.mark.parametrize("quant", ["q4_0", "q8_0", "f16"])
@pytest.mark.parametrize("prediction", [None, Prediction()])
def test_experts_are_as_sparse_as_asked_and_used_alike(tmp_path, quant, prediction):
    out = tmp_path / "m.gguf"
    write_synthetic(out, "m", mixture(), rates_for(0.85, 0.3), quant, prediction=prediction)
    measured = measure_rates(out)
    assert (measured.gate, measured.up, measured.h) == pytest.approx((0.3, 0.5, 0.15), abs=0.03)
    engine = Engine.load(out)
    assert engine.config.synthetic and (engine.config.experts, engine.config.experts_used) == (8, 2)
    engine.count_activations(True)
    engine.session(512).logits(list(range(300, 700)), "exact")
    counts = engine.counters()
    computed = counts.routed.sum() * engine.config.ffn_size
    for name, rate in (("gate", 0.3), ("up", 0.5), ("h", 0.15)):
        assert getattr(counts, name).sum() / computed == pytest.approx(rate, abs=0.02)
    assert counts.routed.min() > 70 and counts.routed.max() < 135  # 100 of 400 tokens each on average
    if prediction is not None:
        assert measured.selected == pytest.approx(1.2, rel=0.07) and measured.recall > 0.9
        assert counts.selected.sum() / counts.h.sum() == pytest.approx(1.2, rel=0.07)
        assert counts.hit.sum() / counts.h.sum() > 0.9


def test_the_dense_twin_of_a_mixture_is_a_llama_file_with_experts(tmp_path):
    write_synthetic(tmp_path / "twin.gguf", "m", mixture("swiglu"), rates_for(0.9, 0.25), "q4_0")
    with GGUFFile.open(tmp_path / "twin.gguf") as file:
        keys = {key: file.metadata[f"llama.{key}"] for key in ("expert_count", "expert_used_count")}
        shapes = {name: file.tensors[f"blk.1.ffn_{name}.weight"].shape for name in ("gate_inp", "down_exps")}
    assert keys == {"expert_count": 8, "expert_used_count": 2}
    assert shapes == {"gate_inp": (8, 256), "down_exps": (8, 256, 640)}
    assert len(decode(Engine.load(tmp_path / "twin.gguf"), 8, "dense")) == 8


def test_memory_is_that_of_some_rows(tmp_path):
    """The embedding alone is 57 MB in F16; a file larger than memory is written like this one."""
    config = shape_config("smollm2-135m", "drelu", layers=2)
    write_synthetic(tmp_path / "warm", "m", config, rates_for(0.9, 0.25), "q4_0")  # imports and tables
    for quant in ("q4_0", "q8_0", "f16"):
        tracemalloc.start()
        write_synthetic(tmp_path / "m", "m", config, rates_for(0.9, 0.25), quant, prediction=Prediction())
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 48 << 20, quant


def test_memory_is_not_that_of_the_experts(tmp_path):
    config = mixture(hidden_size=512, ffn_size=4096, experts=16)  # 200 million weights of experts, 113 MB
    tracemalloc.start()
    size = write_synthetic(tmp_path / "m", "m", config, rates_for(0.9, 0.25), "q4_0", prediction=Prediction())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size > 100 << 20 and peak < 48 << 20


def test_predictor_ranks_come_to_the_share_that_was_asked_for():
    config = shape_config("mistral-7b", "drelu")
    for share in (0.02, 0.06, 0.2):
        ranks = predictor_ranks(config, share)
        cost = sum(ranks) * (config.ffn_size + config.hidden_size)
        assert cost / (config.n_layers * 3 * config.ffn_size * config.hidden_size) == pytest.approx(share, rel=0.01)
        assert all(rank % 32 == 0 for rank in ranks) and max(ranks) - min(ranks) <= 32
    assert predictor_ranks(config, 1e-6) == (32,) * config.n_layers


@pytest.mark.parametrize("values", [{"selected": 0.9}, {"selected": float("nan")}, {"share": 0.0}, {"share": 1.5}])
def test_impossible_predictors(values):
    with pytest.raises(UserError, match="--selected" if "selected" in values else "--predictor-share"):
        Prediction(**values)


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q8_0, Type.F16, Type.F32])
def test_few_levels_are_exact(kind):
    levels = np.random.default_rng(0).integers(-1, 2, (9, 64), dtype=np.int8)
    for scale in (1.0, 0.25):
        values = dequantize(few_levels(levels, scale, kind).ravel(), kind, levels.shape)
        np.testing.assert_array_equal(values, scale * levels)


@pytest.mark.parametrize("quant", ["q4_0", "q8_0"])
def test_ternary_gates_open_as_often_and_are_read_with_two_bits(tmp_path, quant):
    config, rates = shape_config("smollm2-135m", "drelu", layers=2), rates_for(0.9, 0.25)
    write_synthetic(tmp_path / "plain", "m", config, rates, quant)
    write_synthetic(tmp_path / "ternary", "m", config, rates, quant, ternary_gates=True)
    measured = measure_rates(tmp_path / "ternary")
    for name in ("gate", "up", "h"):
        assert getattr(measured, name) == pytest.approx(getattr(rates, name), abs=0.015)
    sizes = [Engine.load(tmp_path / name).weight_bytes for name in ("plain", "ternary")]
    bits = {"q4_0": 4.5, "q8_0": 8.5}[quant]
    assert sizes[0] - sizes[1] == 2 * 1536 * (576 * (bits - 2) / 8 - 4)
    with pytest.raises(UserError, match="--predictor-share 0"):
        write_synthetic(tmp_path / "both", "m", config, rates, quant, prediction=Prediction(), ternary_gates=True)


def test_the_dense_twin_is_a_plain_swiglu_file(tmp_path):
    config = shape_config("smollm2-135m", "swiglu", 2)
    write_synthetic(tmp_path / "twin.gguf", "small", config, rates_for(0.9, 0.25), "q4_0")
    with GGUFFile.open(tmp_path / "twin.gguf") as file:
        assert file.metadata["general.architecture"] == "llama"
        assert file.metadata["general.name"] == "synthetic small"
        read = ModelConfig.from_gguf(file)
    assert (read.activation, read.synthetic, read.ffn_size) == ("swiglu", True, config.ffn_size)
    assert len(decode(Engine.load(tmp_path / "twin.gguf"), 8, "dense")) == 8


def test_the_same_seed_writes_the_same_file(tmp_path):
    config = shape_config("smollm2-135m", "drelu", 1)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_synthetic(tmp_path / name, "m", config, rates_for(0.9, 0.25), "q4_0", seed)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q8_0, Type.F16, Type.F32])
def test_random_rows_have_the_moments_that_were_asked_for(kind):
    rows = random_rows(np.random.default_rng(0), (512, 256), kind, Rows(0.5, -0.3))
    values = dequantize(rows.ravel(), kind, (512, 256))
    constant = values[:, ::32]
    others = np.delete(values, np.s_[::32], axis=1)
    assert others.mean() == pytest.approx(0, abs=0.01)
    assert others.std() == pytest.approx(0.5, rel=0.02)
    assert constant.mean() == pytest.approx(-0.3, rel=0.03)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_has_a_sparse_and_a_dense_config(shape):
    sparse, dense = shape_config(shape, "drelu"), shape_config(shape, "swiglu")
    assert sparse.sparse and sparse.activation == "drelu" and dense.activation == "swiglu"
    assert (sparse.n_layers, sparse.hidden_size, sparse.ffn_size) == (dense.n_layers, dense.hidden_size, dense.ffn_size)


@pytest.mark.parametrize(("sparsity", "gate_rate"), [(0.7, 0.25), (1.0, 0.25), (-0.1, 1.0), (0.9, 1.5)])
def test_rates_that_contradict_each_other(sparsity, gate_rate):
    with pytest.raises(UserError, match="--gate-rate"):
        rates_for(sparsity, gate_rate)


def test_rates_follow_from_sparsity_and_gate():
    assert rates_for(0.9, 0.25) == Rates(0.25, pytest.approx(0.4), pytest.approx(0.1)) == rates_for(None, None)


@pytest.mark.parametrize(
    ("sparsity", "gate_rate", "expected"),
    [(None, None, (0.2, 0.1)), (0.95, None, (0.1, 0.05)), (None, 0.3, (0.3, 0.15)), (0.875, 0.25, (0.25, 0.125))],
)
def test_rates_of_mirrored_ups_follow_from_either(sparsity, gate_rate, expected):
    rates = rates_for(sparsity, gate_rate, mirrored_ups=True)
    assert (rates.gate, rates.h) == pytest.approx(expected) and rates.up == pytest.approx(0.5)


@pytest.mark.parametrize(("sparsity", "gate_rate"), [(0.9, 0.25), (0.4, None), (None, 1.1), (1.0, None)])
def test_rates_that_mirrored_ups_cannot_have(sparsity, gate_rate):
    with pytest.raises(UserError, match="--gate-rate"):
        rates_for(sparsity, gate_rate, mirrored_ups=True)


@pytest.mark.parametrize(
    ("activation", "group", "problem"),
    [("swiglu", 1, "--mirrored-ups: neurons of a dense model"), ("drelu", 1, "in pairs"), ("drelu", 3, "in pairs")],
)
def test_ups_that_cannot_be_mirrored(activation, group, problem):
    with pytest.raises(UserError, match=problem):
        shape_config("smollm2-135m", activation, neurons_per_gate=group, mirrored_ups=True)


@pytest.mark.parametrize(
    ("shape", "activation", "group", "problem"),
    [
        ("mistral-7b", "swiglu", 2, "dense"),
        ("mistral-7b", "drelu", 3, "14336 neurons"),
        ("mixtral-47b", "drelu", 2, "experts"),
        ("mistral-7b", "drelu", 65, "not from 1 to 64"),
    ],
)
def test_gates_that_cannot_be_shared_so(shape, activation, group, problem):
    with pytest.raises(UserError, match=problem):
        shape_config(shape, activation, neurons_per_gate=group)


def test_an_unknown_shape_is_named():
    with pytest.raises(UserError, match="--shape gpt-9"):
        shape_config("gpt-9", "drelu")


def test_nothing_is_left_when_the_file_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        write_synthetic(
            tmp_path / "no" / "m.gguf", "m", shape_config("smollm2-135m", "drelu", 1), rates_for(0.9, 0.25), "q4_0"
        )
    assert list(tmp_path.iterdir()) == []
