"""Predicted mode: right against a reference, the same bits however it is run, its cost and recall counted."""

import gguf
import numpy as np
import pytest
import torch
from agreement import TOKENS, equal_bits, logits_error
from factories import add_predictor, random_predictor
from gguf_files import edit_gguf
from transformers import AutoModelForCausalLM

import turbosparse  # noqa: F401  registers the sparse model types
from turbosparse import _native
from turbosparse.engine import Engine
from turbosparse.errors import UserError
from turbosparse.model.config import ModelConfig
from turbosparse.model.gguf import GGUFFile

Type = gguf.GGMLQuantizationType


@pytest.fixture(scope="module")
def predicting(tiny_gguf, tmp_path_factory):
    """predicting(family, quant, normed) -> (file, predictor): a tiny drelu model whose first layer has no predictor."""

    def make(family="llama", quant="f32", normed=False, rank=32, activation="drelu"):
        source = tiny_gguf(family, activation, quant)
        with GGUFFile.open(source) as file:
            config = ModelConfig.from_gguf(file)
        predictor = random_predictor(config.n_layers, config.hidden_size, config.ffn_size, rank, normed, without=0)
        kind = {"q4_0": Type.Q4_0, "q8_0": Type.Q8_0, "f32": Type.F32}[quant]
        return add_predictor(source, tmp_path_factory.mktemp("p") / "model.gguf", predictor, kind), predictor

    return make


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("family", "activation"), [("llama", "drelu"), ("gemma2", "reglu")])
@pytest.mark.parametrize("rank", [32, 7])
def test_fp32_logits_are_those_of_a_masked_reference(predicting, tiny_folder, family, activation, normed, rank):
    path, predictor = predicting(family, "f32", normed, rank, activation)
    engine = Engine.load(path, compute="f32", threads=2)
    model = AutoModelForCausalLM.from_pretrained(
        tiny_folder(family, activation), dtype=torch.float32, attn_implementation="eager"
    )
    for layer, matrices in zip(model.model.layers, predictor.layers, strict=True):
        if matrices is not None:
            mask(layer, *matrices, normed)
    with torch.no_grad():
        theirs = model(torch.tensor([TOKENS])).logits[0].numpy()
    ours = engine.session().logits(TOKENS, "predicted")
    assert logits_error(ours, theirs).max() < 1e-4
    assert not np.allclose(ours, engine.session().logits(TOKENS, "exact"), rtol=0.1)  # the mask does something


def mask(layer, fc1: np.ndarray, fc2: np.ndarray, threshold: float, normed: bool) -> None:
    """Make a layer of the reference skip the neurons that the predictor does not select."""
    fc1, fc2 = (torch.tensor(matrix, dtype=torch.float32) for matrix in (fc1, fc2))
    norm = getattr(layer, "pre_feedforward_layernorm", layer.post_attention_layernorm)
    seen = {}
    norm.register_forward_hook(lambda _module, inputs, output: seen.update(raw=inputs[0], normed=output))

    def select(_module, inputs):
        x = seen["normed" if normed else "raw"]
        return (inputs[0] * (torch.relu(x @ fc1.T) @ fc2.T >= threshold),)

    layer.mlp.down_proj.register_forward_pre_hook(select)


@pytest.mark.parametrize("quant", ["q4_0", "q8_0", "f32"])
@pytest.mark.parametrize("isa", _native.isas())
@pytest.mark.parametrize("normed", [True, False])
def test_decoding_reading_threads_and_batches_give_the_same_bits(predicting, isa, quant, normed):
    path, _ = predicting("llama", quant, normed)
    reference = None
    for threads in (1, 2, 3, 5):
        engine = Engine.load(path, threads=threads, isa=isa)
        assert engine.modes == ("dense", "exact", "predicted")
        rows = engine.session().logits(TOKENS, "predicted")
        reference = rows if reference is None else reference
        session = engine.session()
        single = np.stack([session.decode(token, "predicted") for token in TOKENS])
        assert equal_bits(rows, reference) and equal_bits(single, reference), threads
        for size in (2, 3, 5):
            sessions = [engine.session() for _ in range(size)]
            for behind, session in enumerate(sessions):
                session.logits(TOKENS[: 9 + behind], "predicted")
            batch = engine.decode_batch(sessions, TOKENS[9 : 9 + size], "predicted")
            assert equal_bits(batch, reference[9 : 9 + size])


def test_a_prompt_is_computed_exactly_and_the_other_modes_do_not_change(predicting, tiny_gguf):
    path, _ = predicting("llama", "q8_0")
    engine, plain = Engine.load(path), Engine.load(tiny_gguf("llama", "drelu", "q8_0"))
    expected = plain.session().prefill(TOKENS, "exact")
    for mode in engine.modes:
        assert equal_bits(engine.session().prefill(TOKENS, mode), expected)
    assert engine.traffic().selected is None and engine.traffic().tokens == 0
    with pytest.raises(UserError, match="mode predicted"):
        plain.session().decode(5, "predicted")


def test_only_what_is_needed_is_read(predicting):
    engine = Engine.load(predicting("llama", "q8_0", rank=32)[0], threads=3)
    c = engine.config
    session = engine.session()
    for token in TOKENS[:4]:
        session.decode(token, "predicted")
    traffic = engine.traffic(reset=True)
    session = engine.session()
    for token in TOKENS[:4]:
        session.decode(token, "exact")
    exact = engine.traffic()
    row, short = c.hidden_size // 32 * 34, 34
    assert 0 < traffic.selected < 0.5 and 0 < traffic.active < exact.active  # one layer of two has a predictor
    neurons = c.n_layers * c.ffn_size
    attention = exact.bytes - round(4 * neurons * (1 + exact.open + exact.active)) * row
    every_gate = 4 * c.ffn_size  # of the layer without a predictor
    predictor = 4 * (32 * row + c.ffn_size * short)
    listed = round(4 * neurons * (traffic.selected + traffic.open + traffic.active))
    assert traffic.bytes == attention + predictor + (every_gate + listed) * row


@pytest.mark.parametrize("mode", ["exact", "predicted"])
def test_recall_and_selection_are_counted_and_change_no_bit(predicting, mode):
    path, _ = predicting("llama", "f32", True)
    engine = Engine.load(path, compute="f32", threads=2)
    plain = engine.session().logits(TOKENS, mode)
    engine.count_activations()
    assert equal_bits(engine.session().logits(TOKENS, mode), plain)
    counts = engine.counters(reset=True)
    assert counts.tokens == len(TOKENS)
    assert not counts.selected[0].any() and not counts.hit[0].any()
    assert (counts.hit <= np.minimum(counts.selected, counts.h)).all()
    # The predictor knows nothing: it selects as many of those that fire as of all.
    share = counts.selected[1].sum() / counts.tokens / engine.config.ffn_size
    assert 0.3 < share < 0.7 and counts.hit[1].sum() / counts.h[1].sum() == pytest.approx(share, abs=0.1)
    session = engine.session()
    for token in TOKENS:
        session.decode(token, mode)
    single = engine.counters()
    # And of |h| it misses as large a share as of those that fire.
    missed = counts.missed[1].sum() / counts.mass[1].sum()
    assert missed == pytest.approx(1 - counts.hit[1].sum() / counts.h[1].sum(), abs=0.1)
    assert ((counts.missed == 0) | (counts.hit < counts.h)).all() and ((counts.mass > 0) == (counts.h > 0)).all()
    for name in ("gate", "up", "h", "selected", "hit", "mass", "missed"):
        assert np.array_equal(getattr(single, name), getattr(counts, name)), name


def test_an_empty_and_a_full_selection(tiny_gguf, tmp_path):
    source = tiny_gguf("llama", "drelu", "q8_0")
    with GGUFFile.open(source) as file:
        config = ModelConfig.from_gguf(file)
    every = random_predictor(config.n_layers, config.hidden_size, config.ffn_size, 32, True)
    for threshold in (-1e9, 1e9):
        made = [(fc1, fc2, threshold) for fc1, fc2, _ in every.layers]
        path = add_predictor(source, tmp_path / "m.gguf", type(every)(made, True), Type.Q8_0)
        engine = Engine.load(path, threads=2)
        session, exact = engine.session(), engine.session()
        a, b = session.decode(TOKENS[0], "predicted"), exact.decode(TOKENS[0], "exact")
        assert equal_bits(a, b) == (threshold < 0)
        assert np.isfinite(a).all()


def test_a_threshold_is_reached_by_what_equals_it(tiny_gguf, tmp_path):
    """Scores of exactly 0 are selected at 0 and not at the next number."""
    source = tiny_gguf("llama", "drelu", "f32")
    with GGUFFile.open(source) as file:
        config = ModelConfig.from_gguf(file)
    zeros = random_predictor(config.n_layers, config.hidden_size, config.ffn_size, 8, True)
    for threshold, share in ((0.0, 1.0), (float(np.nextafter(np.float32(0), np.float32(1))), None)):
        made = [(fc1, 0 * fc2, threshold) for fc1, fc2, _ in zeros.layers]
        engine = Engine.load(add_predictor(source, tmp_path / "m.gguf", type(zeros)(made, True), Type.F32))
        engine.session().decode(TOKENS[0], "predicted")
        assert engine.traffic().selected == share


BROKEN = {
    "rank": ({"ranks": [8]}, "predictor.rank is not a list of 2 numbers"),
    "no rank at all": ({"ranks": [0, 0]}, "impossible sizes"),
    "threshold": ({"thresholds": [0.5, float("nan")]}, "predictor.threshold is not a list of 2 numbers"),
    "whole thresholds": ({"thresholds": [1, 2]}, "predictor.threshold is not a list of 2 numbers"),
    "promises": ({"recall": [0.9]}, "predictor.recall is not a list of 2 numbers"),
    "no number promised": ({"recall": [0.9, float("nan")]}, "predictor.recall is not a list of 2 numbers"),
    "everything promised": ({"recall": [0.9, 1.0]}, "predictor.recall is from 0.9 to 1, which is not between 0 and 1"),
    "less than nothing promised": ({"recall": [-0.5, 0.9]}, "not between 0 and 1"),
    "nothing promised at length": ({"recall": [0.0, 0.0]}, "not between 0 and 1"),
    "input": ({"input": "guess"}, "'guess' is not one of normed, residual, gate"),
    "gates with matrices": ({"input": "gate"}, "impossible sizes"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_damaged_keys_are_said_in_one_sentence(case, predicting, tmp_path):
    path, _ = predicting("llama", "f32")
    changes, message = BROKEN[case]
    names = {"ranks": "rank", "thresholds": "threshold", "recall": "recall", "input": "input"}
    keys = {f"turbosparse.predictor.{names[name]}": value for name, value in changes.items()}
    broken = edit_gguf(path, tmp_path / "broken.gguf", keys)
    with pytest.raises(UserError, match=message):
        Engine.load(broken)


def test_a_predictor_that_the_keys_do_not_promise_is_refused(predicting, tmp_path):
    path, _ = predicting("llama", "f32")
    data = path.read_bytes().replace(b"turbosparse.predictor.rank", b"turbosparse.predictor.renk")
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(UserError, match=r"blk\.1\.fc1\.weight"):
        Engine.load(tmp_path / "m.gguf")
