"""Predictors of neurons of whom two share an up, with opposite signs."""

import json

import numpy as np
import pytest
import torch
from agreement import logits_error

from turbosparse.engine import Engine
from turbosparse.model.config import ModelConfig
from turbosparse.model.gguf import GGUFFile
from turbosparse.predict import Wish, train_predictors
from turbosparse.predict.decoder import Decoder, embed, logits

CPU = torch.device("cpu")
TOKENS = [int(token) for token in np.random.default_rng(3).integers(3, 300, size=70)]


@pytest.fixture
def text(tmp_path):
    rng = np.random.default_rng(0)
    words = ["fox", "dog", "the", "quick", "path", "return", "12345"]
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": " ".join(rng.choice(words, 60))}) for _ in range(60)))
    return path


@pytest.mark.parametrize(("family", "group"), [("llama", 2), ("gemma2", 4)])
def test_the_collecting_decoder_computes_what_the_engine_does(tiny_gguf, family, group):
    path = tiny_gguf(family, "drelu", "f32", group, True)
    with GGUFFile.open(path) as file, torch.inference_mode():
        config = ModelConfig.from_gguf(file)
        stream = torch.stack([embed(file, config, TOKENS)])
        for layer in range(config.n_layers):
            stream, fired = Decoder(file, config, layer, CPU)(stream)
            assert fired.h.shape[-1] == config.ffn_size
        ours = logits(file, config, CPU)(stream[0])
    theirs = Engine.load(path, compute="f32").session().logits(TOKENS, "exact")
    assert logits_error(ours.numpy(), theirs).max() < 1e-4


@pytest.mark.parametrize("wish", [{"rank": 64, "epochs": 1}, {"gates": True}], ids=["low rank", "gate"])
def test_they_are_trained_used_and_audited(tiny_gguf, text, tmp_path, wish):
    out = tmp_path / "out.gguf"
    report = train_predictors(tiny_gguf("llama", "drelu", "q8_0", 2, True), text, out, Wish(recall=0.9, **wish))
    engine = Engine.load(out, threads=2)
    assert engine.config.mirrored_ups and "predicted" in engine.modes
    words = engine.tokenizer.encode(json.loads(text.read_text().splitlines()[0])["text"])[:200]
    engine.count_activations()
    engine.session().logits(words, "predicted")
    counts = engine.counters()
    assert 1 - counts.missed.sum() / counts.mass.sum() == pytest.approx(report.mean("mass_kept"), abs=0.05)
    assert counts.h.sum() / counts.h.size / len(words) == pytest.approx(report.mean("active"), rel=0.1)
    engine.count_activations(False)
    session = engine.session()
    session.audit(0.5, 1)
    for token in words[:60]:
        session.decode(token, "predicted")
    assert session.audit_report.kept.mean == pytest.approx(report.mean("mass_kept"), abs=0.07)
