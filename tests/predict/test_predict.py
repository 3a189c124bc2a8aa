"""Predictors from a model and a text: the collecting decoder, the fit, the thresholds, the file, the run."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from agreement import logits_error
from gguf import GGMLQuantizationType as Type

from turbosparse.documents import read_documents
from turbosparse.engine import Engine
from turbosparse.errors import UserError
from turbosparse.model.config import ModelConfig
from turbosparse.model.gguf import GGUFFile
from turbosparse.model.layout import EMBEDDING, OUTPUT, OUTPUT_NORM
from turbosparse.model.quantize import dequantize
from turbosparse.predict import Wish, train, train_predictors
from turbosparse.predict.collect import Collector
from turbosparse.predict.decoder import Decoder, embed
from turbosparse.predict.fit import Tokens, fit, rounded
from turbosparse.predict.measure import quality, threshold_for
from turbosparse.predict.ranks import share_out

CPU = torch.device("cpu")
TOKENS = [int(token) for token in np.random.default_rng(3).integers(3, 300, size=70)]
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"]


@pytest.fixture
def text(tmp_path):
    """About 6000 tokens of words that are drawn at random."""
    rng = np.random.default_rng(0)
    words = ["fox", "dog", "the", "quick", "path", "return", "12345", "über", "日本", "x + y"]
    path = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": " ".join(rng.choice(words, 60))}) for _ in range(60)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("activation", ["drelu", "reglu"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_collecting_decoder_computes_what_the_engine_does(tiny_gguf, family, activation):
    path = tiny_gguf(family, activation)
    with GGUFFile.open(path) as file, torch.inference_mode():
        config = ModelConfig.from_gguf(file)
        stream = torch.stack([embed(file, config, TOKENS)])
        for layer in range(config.n_layers):
            stream, _ = Decoder(file, config, layer, CPU)(stream)
        norm, output = (
            torch.from_numpy(dequantize(tensor.data, tensor.type, tensor.shape))
            for tensor in (file.tensors[OUTPUT_NORM], file.tensors.get(OUTPUT, file.tensors[EMBEDDING]))
        )
        ours = torch.nn.functional.rms_norm(stream[0], norm.shape, norm, config.norm_eps) @ output.T
        if config.logit_softcap is not None:
            ours = config.logit_softcap * torch.tanh(ours / config.logit_softcap)
    theirs = Engine.load(path, compute="f32").session().logits(TOKENS, "exact")
    assert logits_error(ours.numpy(), theirs).max() < 1e-4


def tokens_of_two_directions(count: int, neurons: int = 64) -> Tokens:
    """Neurons that fire where both of two directions out of 16 are positive: what the form can express."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((count, 32)) + 0.5
    first, second = (rng.standard_normal((32, 8))[:, rng.integers(8, size=neurons)] for _ in range(2))
    mass = np.maximum(x @ first, 0) * np.maximum(x @ second, 0)
    return Tokens(x.astype(np.float16), mass.astype(np.float16))


def test_a_fitted_predictor_finds_what_fires_on_tokens_it_has_not_seen():
    tokens = tokens_of_two_directions(9000)
    seen, tuned, new = (Tokens(tokens.x[part], tokens.mass[part]) for part in np.split(np.arange(9000), [7000, 8000]))
    fc1, fc2 = fit(seen, 32, Type.Q8_0, 15.0, 0, CPU)
    threshold = threshold_for(tuned, fc1, fc2, 0.98)
    found = quality(new, fc1, fc2, threshold, 3, 0.5)
    assert (found.layer, found.rank, found.bytes_share) == (3, 32, 0.5)
    assert found.mass_kept == pytest.approx(0.98, abs=0.01)
    blind = 0.98 / found.active  # what has to be selected at random for the same
    assert found.selected < 0.6 * blind


def test_a_threshold_keeps_the_mass_that_is_asked_for_and_quality_counts_it():
    rng = np.random.default_rng(2)
    mass = np.maximum(rng.standard_normal((300, 8)), 0).astype(np.float16)
    tokens = Tokens(np.float16(rng.standard_normal((300, 8))), mass)
    fc1, fc2 = torch.randn(32, 8), torch.randn(8, 32)
    score = (torch.relu(torch.from_numpy(tokens.x).float() @ fc1.T) @ fc2.T).numpy()
    for recall in (0.5, 0.9, 1.0):
        threshold = threshold_for(tokens, fc1, fc2, recall)
        chosen, whole = score >= threshold, mass.astype(float)
        assert whole[chosen].sum() / whole.sum() >= recall - 1e-9
        # No more than one bin of 65536 too low.
        higher = score >= threshold + (score.max() - score.min()) / 30000
        assert whole[higher].sum() / whole.sum() < recall
        found = quality(tokens, fc1, fc2, threshold, 0, 0.1)
        assert found.mass_kept == pytest.approx(whole[chosen].sum() / whole.sum())
        assert found.recall == pytest.approx((chosen & (mass > 0)).sum() / (mass > 0).sum())
        assert found.selected == pytest.approx(chosen.sum() / (mass > 0).sum())


def test_a_layer_that_never_fires_selects_nothing_much():
    tokens = Tokens(np.ones((40, 8), np.float16), np.zeros((40, 4), np.float16))
    threshold = threshold_for(tokens, torch.ones(32, 8), torch.ones(4, 32), 0.98)
    assert quality(tokens, torch.ones(32, 8), torch.ones(4, 32), threshold, 0, 0.1).mass_kept == 1.0


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q8_0, Type.F16])
def test_rounding_is_near_what_is_stored_and_passes_gradients(kind):
    matrix = torch.randn(5, 64, requires_grad=True)
    near = rounded(matrix, kind)
    limit = {Type.Q4_0: 0.15, Type.Q8_0: 0.01, Type.F16: 0.0}[kind]
    assert (near - matrix).norm() <= limit * matrix.norm()
    near.sum().backward()
    assert torch.equal(matrix.grad, torch.ones(5, 64))


def test_ranks_go_where_they_explain_most():
    steep, flat = torch.zeros(96), torch.full((96,), 0.01)
    steep[:32] = 0.03
    assert share_out([steep, flat], 2) == [32, 32]
    assert share_out([steep, flat], 3) == [32, 64]
    assert share_out([steep, flat], 4) == [32, 96]
    assert share_out([steep, flat], 99) == [96, 96]


@pytest.mark.parametrize("quant", ["q4_0", "q8_0"])
def test_the_file_has_predictors_that_run_and_everything_else_as_it_was(tiny_gguf, text, tmp_path, quant):
    source, out = tiny_gguf("llama", "drelu", quant), tmp_path / "out.gguf"
    report = train_predictors(source, text, out, Wish(rank=32, recall=0.9, epochs=2))
    assert [path.name for path in tmp_path.iterdir() if path != text] == ["out.gguf"]
    with GGUFFile.open(source) as before, GGUFFile.open(out) as after:
        for key in before.metadata:
            assert after.record(key) == before.record(key)
        for name, tensor in before.tensors.items():
            copied = after.tensors[name]
            assert copied.type == tensor.type and copied.shape == tensor.shape
            assert np.array_equal(copied.data, tensor.data)
        predictor = ModelConfig.from_gguf(after).predictor
        assert predictor is not None and predictor.ranks == (32, 32) and predictor.normed
        assert after.tensors["blk.1.fc2.weight"].type.name.lower() == quant
    engine = Engine.load(out)
    words = next(read_documents(text))
    engine.count_activations()
    engine.session().logits(engine.tokenizer.encode(words)[:200], "predicted")
    counts = engine.counters()
    fired = counts.h.sum()
    assert counts.hit.sum() / fired == pytest.approx(report.mean("recall"), abs=0.1)
    assert counts.selected.sum() / fired == pytest.approx(report.mean("selected"), rel=0.2)
    with pytest.raises(UserError, match="--replace"):
        train_predictors(out, text, tmp_path / "again.gguf", Wish(rank=32))
    train_predictors(out, text, out, Wish(rank=64, epochs=1), replace=True)
    with GGUFFile.open(out) as file:
        assert ModelConfig.from_gguf(file).predictor.ranks == (64, 64)


def test_an_interrupted_run_goes_on_at_the_layer_and_ends_the_same(tiny_gguf, text, tmp_path, monkeypatch):
    source, wish = tiny_gguf("llama", "drelu", "q8_0"), Wish(share=0.7, epochs=1)
    whole, parts = tmp_path / "whole.gguf", tmp_path / "parts.gguf"
    train_predictors(source, text, whole, wish)
    seen, real = [], Collector.layer

    def interrupted(self, layer, progress):
        seen.append(layer)
        if seen == [0, 1]:
            raise KeyboardInterrupt
        return real(self, layer, progress)

    monkeypatch.setattr(Collector, "layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_predictors(source, text, parts, wish)
    assert not parts.exists()
    train_predictors(source, text, parts, wish)
    assert seen == [0, 1, 1]
    assert parts.read_bytes() == whole.read_bytes()


def test_a_folder_is_stored_as_q4_0_first(tiny_folder, text, tmp_path):
    out = tmp_path / "out.gguf"
    train_predictors(tiny_folder("qwen3", "reglu"), text, out, Wish(rank=32, epochs=1))
    with GGUFFile.open(out) as file:
        assert file.tensors["blk.0.ffn_gate.weight"].type == Type.Q4_0


MISTAKES = {
    "dense": ({"rank": 32}, "is a dense swiglu model"),
    "rank": ({"rank": 33}, "--rank 33"),
    "share": ({"share": 0.01}, "--share 0.01"),
    "recall": ({"recall": 2}, "--recall 2"),
    "tokens": ({"tokens": 999}, "--tokens"),
    "out": ({}, "--out"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_sentence(case, tiny_gguf, text, tmp_path):
    wish, named = MISTAKES[case]
    model = tiny_gguf("llama", "dense" if case == "dense" else "drelu", "q8_0")
    out = tmp_path / "absent" / "x.gguf" if case == "out" else tmp_path / "x.gguf"
    with pytest.raises(UserError, match=named) as caught:
        train_predictors(model, text, out, Wish(**wish))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*.gguf"))


def test_the_command_prints_one_json_object(tiny_gguf, text, tmp_path):
    model, out = tiny_gguf("llama", "drelu", "q8_0"), tmp_path / "out.gguf"
    options = ["--data", text, "--rank", "32", "--epochs", "1", "--out", out, "--json"]
    command = [sys.executable, "-m", "turbosparse", "train-predictors", model, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    record = json.loads(done.stdout)
    assert len(record["layers"]) == 2 and record["mean"]["rank"] == 32 and record["output"] == str(out)


def test_windows_of_the_text_are_whole(tiny_gguf, text):
    with GGUFFile.open(tiny_gguf("llama", "drelu")) as file:
        pieces = train._windows(file, ModelConfig.from_gguf(file), text, 10_000)
    assert {len(piece) for piece in pieces} == {256} and len(pieces) >= 16
