"""Neurons that share gates: to the bit what a model computes in which every neuron has a copy of its gate."""

import dataclasses

import numpy as np
import pytest
import torch
from agreement import TOKENS, check_same_bits, equal_bits, logits_error
from shared_rows import BLOCK, FFN, HIDDEN, LAYERS, ROW, make_pair, traffic_of
from transformers import AutoModelForCausalLM

import turbosparse  # noqa: F401  registers the sparse model types
from turbosparse import _native
from turbosparse.engine import LOSSLESS, Engine, SamplingParams, draw_tokens

by_group = pytest.mark.parametrize("group", [2, 3])
by_quant = pytest.mark.parametrize("quant", ["q4_0", "q8_0", "f32"])
by_isa = pytest.mark.parametrize("isa", _native.isas())
by_predictor = pytest.mark.parametrize("predictor", ["low rank", "gate"])


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """pair(group, quant, activation, predictor, ternary) -> files of a tiny Llama."""

    def make(group, *options, **named):
        return make_pair(tmp_path_factory.mktemp("shared"), *options, **named, neurons_per_gate=group)

    return make


@by_group
@pytest.mark.parametrize("activation", ["drelu", "reglu"])
def test_fp32_logits_are_those_of_transformers(pair, group, activation):
    made = pair(group, "f32", activation)
    model = AutoModelForCausalLM.from_pretrained(made.folder, dtype=torch.float32, attn_implementation="eager")
    assert model.model.layers[0].mlp.gate_proj.weight.shape == (FFN // group, HIDDEN)
    with torch.no_grad():
        theirs = model(torch.tensor([TOKENS])).logits[0].numpy()
    engine = Engine.load(made.shared, compute="f32", threads=2)
    assert engine.config.neurons_per_gate == group
    for mode in ("dense", "exact"):
        assert logits_error(engine.session().logits(TOKENS, mode), theirs).max() < 1e-4


@by_group
@by_quant
@by_isa
@by_predictor
def test_every_mode_gives_the_bits_of_repeated_gates(pair, group, quant, isa, predictor):
    made = pair(group, quant, "reglu" if group == 3 else "drelu", predictor)
    for threads in (1, 2):
        shared, repeated = made.engines(threads=threads, isa=isa)
        for mode in ("dense", "exact", "predicted"):
            expected = repeated.session().logits(TOKENS, mode)
            assert equal_bits(shared.session().logits(TOKENS, mode), expected), (threads, mode)
            session = shared.session()
            single = np.stack([session.decode(token, mode) for token in TOKENS])
            assert equal_bits(single, expected), (threads, mode)
            sessions = [shared.session() for _ in range(6)]
            for behind, session in enumerate(sessions):
                session.logits(TOKENS[: 9 + behind], mode)
            assert equal_bits(shared.decode_batch(sessions, TOKENS[9:15], mode), expected[9:15]), (threads, mode)


@by_group
def test_fp32_gives_the_bits_of_repeated_gates(pair, group):
    shared, repeated = pair(group, "q8_0", predictor="low rank").engines(compute="f32", threads=2)
    for mode in shared.modes:
        assert equal_bits(shared.session().logits(TOKENS, mode), repeated.session().logits(TOKENS, mode))


@by_group
@pytest.mark.parametrize("quant", ["q4_0", "q8_0"])
@by_isa
def test_ternary_gates_are_shared_too(pair, group, quant, isa):
    made = pair(group, quant, predictor="low rank", ternary=True)
    check_same_bits(made.shared, isa, (1, 2))
    shared, repeated = made.engines(threads=2, isa=isa)
    for mode in shared.modes:
        assert equal_bits(shared.session().logits(TOKENS, mode), repeated.session().logits(TOKENS, mode)), mode
    plain, _ = pair(group, quant).engines(threads=2, isa=isa)
    read = [traffic_of(engine, "exact") for engine in (shared, plain)]
    dense = [traffic_of(engine, "dense").bytes for engine in (shared, plain)]
    assert dense[0] < dense[1] and read[0].bytes < dense[0]  # the gates are stored in fewer bits


@by_group
@by_quant
@pytest.mark.parametrize("mode", ["dense", "exact"])
def test_a_shared_gate_is_read_once(pair, group, quant, mode):
    shared, repeated = (traffic_of(engine, mode) for engine in pair(group, quant).engines(threads=2))
    saved = 4 * LAYERS * (FFN - FFN // group) * ROW[quant]
    assert repeated.bytes - shared.bytes == saved
    assert (shared.active, shared.open) == (repeated.active, repeated.open)


@by_group
@pytest.mark.parametrize("rows", [1, 5])
def test_a_gate_is_read_once_for_all_selected_neurons_of_a_block(pair, group, rows):
    made = pair(group, predictor="low rank")
    engines = made.engines(threads=2)
    read, selected = [], None
    for engine in engines:
        sessions = [engine.session() for _ in range(rows)]
        for index, session in enumerate(sessions):
            session.prefill(TOKENS[index : index + 9], "exact")
        engine.traffic(reset=True)
        engine.decode_batch(sessions, TOKENS[20 : 20 + rows], "predicted")
        read.append(engine.traffic().bytes)
        for session in sessions:
            session.truncate(9)
        engine.count_activations()
        engine.decode_batch(sessions, TOKENS[20 : 20 + rows], "predicted")
        selected = engine.counters().selected > 0
    fewer = 0
    for layer in selected:
        for start in range(0, FFN, BLOCK):
            neurons = start + np.flatnonzero(layer[start : start + BLOCK])
            fewer += len(neurons) - len(np.unique(neurons // group))
    assert fewer > 0 and read[1] - read[0] == fewer * ROW["q8_0"]


@by_group
@by_predictor
def test_counters_and_audits_are_those_of_repeated_gates(pair, group, predictor):
    engines = pair(group, predictor=predictor).engines(threads=2)
    reports, counts = [], []
    for engine in engines:
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
    assert counts[0].gate.shape == (LAYERS, FFN) and counts[0].hit.any()


@by_group
@by_predictor
def test_lossless_drafts_are_verified_by_shared_gates(pair, group, predictor):
    engine = Engine.load(pair(group, predictor=predictor).shared, threads=2)
    params = SamplingParams(temperature=1.2, top_k=6, seed=5)
    exact, ours = engine.session(200), engine.session(200)
    ours._ahead.fix(4, 3)
    for session in (exact, ours):
        session.prefill(TOKENS[:20], "exact")
    assert list(draw_tokens(ours, params, 100, LOSSLESS)) == list(draw_tokens(exact, params, 100, "exact"))


def test_a_predictor_has_less_to_save_where_gates_are_shared(pair):
    """It selects about a half of the neurons, for a fifth of an unshared gate's bytes."""
    chosen = []
    for engine in pair(2, "f32", predictor="low rank", rank=8).engines(threads=2):
        session = engine.session()
        for token in TOKENS[:20]:
            session.decode(token, "auto-predicted")
        chosen.append(session.choices)
    assert chosen == [("exact",) * LAYERS, ("predicted",) * LAYERS]


@pytest.mark.parametrize(("activation", "group"), [("drelu", 0), ("drelu", -2), ("drelu", 5), ("swiglu", 2)])
def test_groups_that_cannot_be_are_refused(pair, activation, group):
    config = Engine.load(pair(2).shared).config
    with pytest.raises(ValueError, match="impossible sizes"):
        _native.Model(dataclasses.replace(config, activation=activation, neurons_per_gate=group), "", False, 1)
