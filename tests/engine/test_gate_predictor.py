"""Gates that are their own predictors: a threshold on the gate says which neurons of the open ones are computed."""

import numpy as np
import pytest
import torch
from agreement import TOKENS, equal_bits, logits_error
from transformers import AutoModelForCausalLM

import turbosparse  # noqa: F401  registers the sparse model types
from turbosparse import _native
from turbosparse.engine import Engine
from turbosparse.model.config import ModelConfig
from turbosparse.model.gguf import GGUFFile
from turbosparse.model.powerinfer_predictor import common_threshold, predictor_copies
from turbosparse.model.quantize import dequantize
from turbosparse.predict.write import StoredPredictor, write_predictors


@pytest.fixture
def by_gate(tiny_gguf, tmp_path):
    """by_gate(thresholds) -> a tiny model whose gates predict, one threshold a layer."""

    def make(thresholds, quant="q8_0", family="llama", activation="drelu", kept=0.0):
        path = tmp_path / "gates.gguf"
        with GGUFFile.open(tiny_gguf(family, activation, quant)) as file:
            layers = ModelConfig.from_gguf(file).n_layers
            thresholds = np.resize(thresholds, layers)
            write_predictors(file, path, [StoredPredictor.of_gate(float(each), kept) for each in thresholds])
        return path

    return make


@pytest.mark.parametrize(("family", "activation"), [("llama", "drelu"), ("gemma2", "reglu")])
def test_fp32_logits_are_those_of_a_masked_reference(by_gate, tiny_folder, family, activation):
    thresholds = [0.3, 0.1, 0.2]
    engine = Engine.load(by_gate(thresholds, "f32", family, activation), compute="f32", threads=2)
    model = AutoModelForCausalLM.from_pretrained(
        tiny_folder(family, activation), dtype=torch.float32, attn_implementation="eager"
    )
    for layer, threshold in zip(model.model.layers, np.resize(thresholds, len(model.model.layers)), strict=True):
        layer.mlp.gate_proj.register_forward_hook(
            lambda _module, _inputs, gate, t=float(threshold): torch.where(gate >= t, gate, 0.0)
        )
    with torch.no_grad():
        theirs = model(torch.tensor([TOKENS])).logits[0].numpy()
    ours = engine.session().logits(TOKENS, "predicted")
    assert logits_error(ours, theirs).max() < 1e-4
    assert not np.allclose(ours, engine.session().logits(TOKENS, "exact"), rtol=0.1)  # the threshold does something


@pytest.mark.parametrize("quant", ["q4_0", "q8_0", "f32"])
@pytest.mark.parametrize("isa", _native.isas())
def test_decoding_reading_threads_and_batches_give_the_same_bits(by_gate, isa, quant):
    path, reference = by_gate([0.2], quant), None
    for threads in (1, 2, 3, 5):
        engine = Engine.load(path, threads=threads, isa=isa)
        rows = engine.session().logits(TOKENS, "predicted")
        reference = rows if reference is None else reference
        session = engine.session()
        single = np.stack([session.decode(token, "predicted") for token in TOKENS])
        assert equal_bits(rows, reference) and equal_bits(single, reference), threads
        sessions = [engine.session() for _ in range(3)]
        for behind, session in enumerate(sessions):
            session.logits(TOKENS[: 9 + behind], "predicted")
        batch = engine.decode_batch(sessions, TOKENS[9:12], "predicted")
        assert equal_bits(batch, reference[9:12])


def test_a_threshold_below_all_open_gates_selects_them_all_and_one_above_none(by_gate):
    engine = Engine.load(by_gate([0.0]), threads=2)
    assert engine.modes == ("dense", "exact", "predicted")
    assert equal_bits(engine.session().logits(TOKENS, "predicted"), engine.session().logits(TOKENS, "exact"))
    nothing = Engine.load(by_gate([1e9]), threads=2)
    logits = nothing.session().decode(TOKENS[0], "predicted")
    assert np.isfinite(logits).all() and nothing.traffic().active == 0


@pytest.mark.parametrize("mode", ["exact", "predicted"])
def test_what_is_selected_and_missed_is_counted_and_changes_no_bit(by_gate, mode):
    engine = Engine.load(by_gate([0.2]), threads=2)
    plain = engine.session().logits(TOKENS, mode)
    engine.count_activations()
    assert equal_bits(engine.session().logits(TOKENS, mode), plain)
    counts = engine.counters()
    assert (counts.hit <= np.minimum(counts.selected, counts.h)).all() and (counts.selected <= counts.gate).all()
    assert 0 < counts.hit.sum() < counts.h.sum() and 0 < counts.selected.sum() < counts.gate.sum()
    # Gates order |h|: what they miss is less of |h| than of the neurons.
    assert counts.missed.sum() / counts.mass.sum() < 1 - counts.hit.sum() / counts.h.sum()


def test_only_the_selected_ups_are_read(by_gate):
    engine = Engine.load(by_gate([0.2]), threads=3)
    reads = {}
    for mode in ("exact", "predicted"):
        session = engine.session()
        for token in TOKENS[:4]:
            session.decode(token, mode)
        reads[mode] = engine.traffic(reset=True)
    exact, predicted = reads["exact"], reads["predicted"]
    neurons, row = 4 * engine.config.n_layers * engine.config.ffn_size, engine.config.hidden_size // 32 * 34
    assert predicted.selected == pytest.approx(predicted.open) and predicted.open < exact.open
    fewer = round(neurons * (exact.open - predicted.open + exact.active - predicted.active))
    assert exact.bytes - predicted.bytes == fewer * row


def test_audits_see_what_thresholds_miss_and_move_them(by_gate):
    engine = Engine.load(by_gate([0.6], kept=0.99), threads=2)
    session = engine.session()
    session.audit(1.0, 1)
    for token in (TOKENS * 3)[:100]:
        session.decode(token, "predicted")
    report = session.audit_report
    assert 0 < report.kept.mean < 0.99
    assert {move.layer for move in report.moves} == {0, 1} and all(move.by < 0 for move in report.moves[:2])


def test_automatic_mode_takes_the_fewest_ups(by_gate):
    engine = Engine.load(by_gate([0.2]), threads=2)
    session = engine.session()
    for token in TOKENS[:20]:
        session.decode(token, "auto-predicted")
    assert session.choices == ("predicted",) * engine.config.n_layers


def test_powerinfer_gets_predictors_that_select_every_neuron(by_gate):
    with GGUFFile.open(by_gate([0.2])) as file:
        config = ModelConfig.from_gguf(file)
        copies = {copy.name: copy for copy in predictor_copies(file, config, common_threshold(config, "x"))}
    assert common_threshold(config, "x") == 0 and len(copies) == 2 * config.n_layers
    for copy in copies.values():
        stored = np.concatenate([part.reshape(-1) for part in copy.parts()])
        assert not dequantize(stored, copy.kind, copy.shape).any()  # scores of 0, and the threshold is 0
