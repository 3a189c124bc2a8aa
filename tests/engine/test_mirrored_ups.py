"""Ups that two neurons share with opposite signs: to the bit what a model computes whose neurons have one each."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from agreement import TOKENS, check_same_bits, equal_bits, logits_error
from factories import add_predictor, make_folder, random_predictor
from folders import edit_weights
from shared_rows import BLOCK, FFN, HIDDEN, KINDS, LAYERS, ROW, Pair, make_pair, traffic_of, write_out
from transformers import AutoModelForCausalLM

import turbosparse  # noqa: F401  registers the sparse model types
from turbosparse import _native
from turbosparse.engine import LOSSLESS, Engine, SamplingParams, draw_tokens
from turbosparse.model.export import export_gguf

by_group = pytest.mark.parametrize("group", [2, 4])
# Gates of three neurons' pairs lie in two blocks each, and the last block is a part of one.
by_shape = pytest.mark.parametrize(("group", "neurons", "quant"), [(2, 96, "q4_0"), (4, 96, "f32"), (6, 72, "q8_0")])
by_isa = pytest.mark.parametrize("isa", _native.isas())
by_predictor = pytest.mark.parametrize("predictor", ["low rank", "gate"])
THRESHOLDS = [0.05, 0.3]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """pair(group, quant, ...) -> files of a tiny Llama with mirrored ups, as of `make_pair`."""

    def make(group: int, quant: str = "q8_0", **options) -> Pair:
        folder = tmp_path_factory.mktemp("mirrored")
        return make_pair(folder, quant, neurons_per_gate=group, mirrored_ups=True, **options)

    return make


@by_group
@pytest.mark.parametrize("thresholds", [None, THRESHOLDS])
def test_fp32_logits_are_those_of_transformers(pair, group, thresholds):
    made = pair(group, "f32", activation_threshold=thresholds)
    model = AutoModelForCausalLM.from_pretrained(made.folder, dtype=torch.float32, attn_implementation="eager")
    assert model.model.layers[0].mlp.up_proj.weight.shape == (FFN // 2, HIDDEN)
    with torch.no_grad():
        theirs = model(torch.tensor([TOKENS])).logits[0].numpy()
    engine = Engine.load(made.shared, compute="f32", threads=2)
    assert engine.config.mirrored_ups and engine.config.neurons_per_gate == group
    for mode in ("dense", "exact"):
        assert logits_error(engine.session().logits(TOKENS, mode), theirs).max() < 1e-4


@by_shape
@by_isa
@by_predictor
def test_every_mode_gives_the_bits_of_ups_that_are_written_out(pair, group, neurons, quant, isa, predictor):
    made = pair(group, quant, predictor=predictor, intermediate_size=neurons, activation_threshold=THRESHOLDS)
    for threads in (1, 2):
        mirrored, repeated = made.engines(threads=threads, isa=isa)
        for mode in ("dense", "exact", "predicted"):
            expected = repeated.session().logits(TOKENS, mode)
            assert equal_bits(mirrored.session().logits(TOKENS, mode), expected), (threads, mode)
            session = mirrored.session()
            single = np.stack([session.decode(token, mode) for token in TOKENS])
            assert equal_bits(single, expected), (threads, mode)
            sessions = [mirrored.session() for _ in range(6)]
            for behind, session in enumerate(sessions):
                session.logits(TOKENS[: 9 + behind], mode)
            assert equal_bits(mirrored.decode_batch(sessions, TOKENS[9:15], mode), expected[9:15]), (threads, mode)


@by_group
def test_fp32_gives_the_bits_of_ups_that_are_written_out(pair, group):
    mirrored, repeated = pair(group, "q8_0", predictor="low rank").engines(compute="f32", threads=2)
    for mode in mirrored.modes:
        assert equal_bits(mirrored.session().logits(TOKENS, mode), repeated.session().logits(TOKENS, mode))


@pytest.mark.parametrize("quant", ["q4_0", "q8_0"])
@by_isa
def test_ternary_gates_go_with_mirrored_ups(pair, quant, isa):
    made = pair(2, quant, predictor="low rank", ternary=True)
    check_same_bits(made.shared, isa, (1, 2))
    mirrored, repeated = made.engines(threads=2, isa=isa)
    for mode in mirrored.modes:
        assert equal_bits(mirrored.session().logits(TOKENS, mode), repeated.session().logits(TOKENS, mode)), mode


@by_group
@pytest.mark.parametrize("quant", ["q4_0", "q8_0", "f32"])
def test_an_up_is_read_once_for_two_neurons(pair, group, quant):
    mirrored, repeated = pair(group, quant).engines(threads=2)
    gates = 4 * LAYERS * (FFN - FFN // group)
    for mode in ("dense", "exact"):
        ours, theirs = traffic_of(mirrored, mode), traffic_of(repeated, mode)
        assert (ours.active, ours.open) == (theirs.active, theirs.open)
        open_gates = round(4 * LAYERS * FFN * ours.open)
        assert 0 < open_gates < 4 * LAYERS * FFN and open_gates % 2 == 0
        ups = open_gates // 2 if mode == "exact" else 4 * LAYERS * FFN // 2
        assert theirs.bytes - ours.bytes == (gates + ups) * ROW[quant]


def test_phases_count_ups_as_they_are_read(pair):
    engine = Engine.load(pair(2, "q4_0").shared, threads=2)
    for mode, phase in (("dense", "up"), ("exact", "up_open")):
        engine.time_phases()
        traffic = traffic_of(engine, mode)
        engine.time_phases(False)
        rows = 4 * LAYERS * FFN * (traffic.open if mode == "exact" else 1) / 2
        assert engine.phases(reset=True)[phase].bytes == round(rows) * ROW["q4_0"]


def _needed(engine: Engine, context: list[int], token: int) -> tuple[np.ndarray, np.ndarray]:
    """Which neurons a token selects, and which of these have an open gate: bool [layers, neurons] each."""
    session = engine.session()
    session.prefill(context, "exact")
    engine.count_activations()
    session.decode(token, "predicted")
    counts = engine.counters()
    engine.count_activations(False)
    return counts.selected > 0, (counts.selected > 0) & (counts.gate > 0)


@by_group
@pytest.mark.parametrize("rows", [1, 5])
def test_an_up_is_read_once_for_all_selected_neurons_of_a_block(pair, group, rows):
    read = []
    needed = np.zeros((2, LAYERS, FFN), bool)
    for engine in pair(group, predictor="low rank").engines(threads=2):
        sessions = [engine.session() for _ in range(rows)]
        for index, session in enumerate(sessions):
            session.prefill(TOKENS[index : index + 9], "exact")
        engine.traffic(reset=True)
        engine.decode_batch(sessions, TOKENS[20 : 20 + rows], "predicted")
        read.append(engine.traffic().bytes)
        for index in range(rows):
            needed |= _needed(engine, TOKENS[index : index + 9], TOKENS[20 + index])
    fewer = [0, 0]
    for kind, (of_kind, per_row) in enumerate(zip(needed, (group, 2), strict=True)):
        for layer in of_kind:
            for start in range(0, FFN, BLOCK):
                neurons = start + np.flatnonzero(layer[start : start + BLOCK])
                fewer[kind] += len(neurons) - len(np.unique(neurons // per_row))
    assert min(fewer) > 0 and read[1] - read[0] == sum(fewer) * ROW["q8_0"]


@by_group
@by_predictor
def test_counters_and_audits_are_those_of_ups_that_are_written_out(pair, group, predictor):
    reports, counts = [], []
    for engine in pair(group, predictor=predictor).engines(threads=2):
        session = engine.session()
        session.audit(0.5, 1)
        for token in TOKENS:
            session.decode(token, "predicted")
        reports.append(session.audit_report)
        engine.count_activations()
        engine.session().logits(TOKENS, "predicted")
        counts.append(engine.counters())
    assert reports[0] == reports[1] and reports[0].kept.mean < 1
    for name in ("gate", "up", "h", "selected", "hit", "mass", "missed"):
        assert np.array_equal(getattr(counts[0], name), getattr(counts[1], name)), name
    assert counts[0].h.shape == (LAYERS, FFN) and counts[0].hit.any()


def test_one_of_two_neurons_fires_whenever_their_gate_is_open(pair):
    engine = Engine.load(pair(2).shared, threads=2)
    engine.count_activations()
    engine.session().logits(TOKENS, "exact")
    counts = engine.counters()
    assert np.array_equal(counts.up[:, ::2] + counts.up[:, 1::2], np.full((LAYERS, FFN // 2), len(TOKENS)))
    assert np.array_equal(counts.h[:, ::2] + counts.h[:, 1::2], counts.gate[:, ::2])
    assert counts.h[:, ::2].any() and counts.h[:, 1::2].any()


@by_predictor
def test_lossless_drafts_are_verified_by_mirrored_ups(pair, predictor):
    engine = Engine.load(pair(2, predictor=predictor).shared, threads=2)
    params = SamplingParams(temperature=1.2, top_k=6, seed=5)
    exact, ours = engine.session(200), engine.session(200)
    ours._ahead.fix(4, 3)
    for session in (exact, ours):
        session.prefill(TOKENS[:20], "exact")
    assert list(draw_tokens(ours, params, 100, LOSSLESS)) == list(draw_tokens(exact, params, 100, "exact"))


@pytest.mark.parametrize("gate", [-1.0, 1.0])
@pytest.mark.parametrize("quant", ["q8_0", "f32"])
def test_all_gates_open_and_none(tmp_path, gate, quant):
    """The FFN sees one channel alone, which is positive for every token."""
    folder = make_folder(tmp_path / "hf", "llama", "drelu", neurons_per_gate=2, mirrored_ups=True)

    def narrow(weights: dict[str, np.ndarray]) -> None:
        weights["model.embed_tokens.weight"][:, 0] = 50.0
        for name, weight in weights.items():
            if "post_attention_layernorm" in name:
                weight[1:] = 0.0
            if ".gate_proj." in name:
                weight[:, 0] = gate
            if ".up_proj." in name:  # far from zero, so that none is rounded to it
                weight[:, 0] = np.copysign(0.2, weight[:, 0])

    edit_weights(folder, narrow)
    export_gguf(folder, tmp_path / "m.gguf", quant)
    engine = Engine.load(tmp_path / "m.gguf", threads=2)
    dense = engine.session().logits(TOKENS, "dense")
    session = engine.session()
    assert equal_bits(np.stack([session.decode(token, "exact") for token in TOKENS]), dense)
    traffic = traffic_of(engine, "exact")
    assert (traffic.open, traffic.active) == ((1.0, 0.5) if gate > 0 else (0.0, 0.0))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        theirs = model(torch.tensor([TOKENS])).logits[0].numpy()
    assert logits_error(dense, theirs).max() < (0.05 if quant == "q8_0" else 1e-4)


def _choices(path: Path) -> tuple[str, ...]:
    session = Engine.load(path, threads=2).session()
    for token in TOKENS[:20]:
        session.decode(token, "auto-predicted")
    return session.choices


def test_a_predictor_has_less_to_save_where_ups_are_mirrored(pair, tmp_path):
    """It selects a third of the neurons. Half of the gates are open, of which exact mode reads half as many ups."""
    mirrored = pair(2, "f32").shared
    predictor = random_predictor(LAYERS, HIDDEN, FFN, 8, True)
    predictor.layers[:] = [(fc1, fc2, 0.25) for fc1, fc2, _ in predictor.layers]
    both = mirrored, write_out(mirrored, tmp_path / "plain.gguf", gates=False)
    paths = [add_predictor(path, tmp_path / f"{path.stem}-p.gguf", predictor, KINDS["f32"]) for path in both]
    assert [_choices(path) for path in paths] == [("exact",) * LAYERS, ("predicted",) * LAYERS]


@pytest.mark.parametrize(("activation", "group"), [("drelu", 1), ("drelu", 3), ("reglu", 2), ("swiglu", 2)])
def test_mirrored_ups_that_cannot_be_are_refused(pair, activation, group):
    config = Engine.load(pair(2).shared).config
    with pytest.raises(ValueError, match="impossible sizes"):
        _native.Model(dataclasses.replace(config, activation=activation, neurons_per_gate=group), "", False, 1)
