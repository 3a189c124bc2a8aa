"""train-predictors where the gates themselves predict: only thresholds are set."""

import json
import subprocess
import sys

import numpy as np
import pytest
from factories import make_ternary_folder

from turbosparse.engine import Engine
from turbosparse.errors import UserError
from turbosparse.model.config import ModelConfig
from turbosparse.model.export import export_gguf
from turbosparse.model.gguf import GGUFFile
from turbosparse.predict import Wish, train_predictors
from turbosparse.predict.gates import gates_are_ternary


@pytest.fixture(scope="module", params=[1, 2])
def folder(tmp_path_factory, request):
    """A tiny dReLU model whose gates are ternary, each of one neuron or of two."""
    return make_ternary_folder(tmp_path_factory.mktemp("ternary") / "hf", neurons_per_gate=request.param)


@pytest.fixture(scope="module")
def file(folder):
    path = folder.with_name("ternary.gguf")
    export_gguf(folder, path, "q4_0")
    return path


@pytest.fixture
def text(tmp_path):
    rng = np.random.default_rng(0)
    words = ["fox", "dog", "the", "quick", "path", "return", "12345"]
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": " ".join(rng.choice(words, 200))}) for _ in range(60)))
    return path


def _predictor(path):
    with GGUFFile.open(path) as opened:
        return ModelConfig.from_gguf(opened).predictor


def test_ternary_gates_are_seen_in_a_file(file, tiny_gguf):
    for path, expected in ((file, True), (tiny_gguf("llama", "drelu", "q4_0"), False)):
        with GGUFFile.open(path) as opened:
            assert gates_are_ternary(opened, ModelConfig.from_gguf(opened)) == expected


def test_ternary_gates_predict_unless_something_else_is_asked_for(file, text, tmp_path):
    out = tmp_path / "out.gguf"
    report = train_predictors(file, text, out, Wish(recall=0.9))
    predictor = _predictor(out)
    assert predictor.input == "gate" and predictor.ranks == (0, 0) and min(predictor.thresholds) > 0
    assert report.mean("bytes_share") == 0 and report.mean("mass_kept") == pytest.approx(0.9, abs=0.03)
    engine = Engine.load(out)
    engine.count_activations()
    words = json.loads(text.read_text().splitlines()[0])["text"]
    engine.session().logits(engine.tokenizer.encode(words)[:200], "predicted")
    counts = engine.counters()
    assert 1 - counts.missed.sum() / counts.mass.sum() == pytest.approx(0.9, abs=0.05)
    assert counts.selected.sum() / counts.h.sum() == pytest.approx(report.mean("selected"), rel=0.2)
    train_predictors(out, text, out, Wish(gates=False, share=0.7, epochs=0.5), replace=True)
    assert _predictor(out).input == "normed" and min(_predictor(out).ranks) > 0


def test_the_command_says_that_nothing_was_trained(file, text, tmp_path):
    command = [
        sys.executable,
        "-m",
        "turbosparse",
        "train-predictors",
        file,
        "--data",
        text,
        "--out",
        tmp_path / "x.gguf",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "--no-gates" in done.stderr and "0.0 %" in done.stdout


def test_any_gates_can_be_asked_to(tiny_gguf, text, tmp_path):
    out, higher = tmp_path / "out.gguf", tmp_path / "higher.gguf"
    train_predictors(tiny_gguf("llama", "drelu", "q8_0"), text, out, Wish(gates=True, recall=0.8))
    train_predictors(out, text, higher, Wish(gates=True, recall=0.99), replace=True)
    assert _predictor(out).input == "gate" and sum(_predictor(higher).thresholds) < sum(_predictor(out).thresholds)
    with pytest.raises(UserError, match="--keep"):
        train_predictors(out, text, higher, Wish(keep=True))


def test_gates_are_not_trained():
    for wish in ({"rank": 32}, {"keep": True}, {"together": True}, {"end_to_end": 3}):
        with pytest.raises(UserError, match="--gates trains nothing"):
            Wish(gates=True, **wish)


def test_a_folder_keeps_its_thresholds_for_exports(folder, text, tmp_path):
    out, exported = tmp_path / "out.gguf", tmp_path / "exported.gguf"
    train_predictors(folder, text, out, Wish(recall=0.9))
    subprocess.run([sys.executable, "-m", "turbosparse", "export", folder, exported], check=True, timeout=60)
    assert _predictor(out).input == "gate" and _predictor(out) == _predictor(exported)
    shown = subprocess.run(
        [sys.executable, "-m", "turbosparse", "info", exported], check=True, timeout=60, capture_output=True, text=True
    )
    assert "the gates themselves" in shown.stdout
