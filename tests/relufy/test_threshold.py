"""Activation thresholds: what they compute, that a folder keeps them, and how a stage sets them."""

import json

import pytest
import torch
from factories import make_folder
from transformers import AutoModelForCausalLM

import turbosparse  # noqa: F401  registers the sparse model types
from turbosparse.relufy.drelu import TurboSparseLlamaConfig
from turbosparse.relufy.objective import ffns
from turbosparse.relufy.recipes import Sparsity
from turbosparse.relufy.threshold import set_thresholds
from turbosparse.relufy.validate import validate

_IDS = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "hf", "llama", "drelu", activation_threshold=[0.0, 0.25])


def _load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("activation", ["drelu", "reglu"])
def test_what_is_smaller_than_the_threshold_becomes_zero(tmp_path, activation):
    model = _load(make_folder(tmp_path / "hf", "qwen2", activation, activation_threshold=[0.1, 0.4]))
    x = torch.randn(7, model.config.hidden_size)
    for mlp, threshold in zip(ffns(model), (0.1, 0.4), strict=True):
        gate, up = mlp.gate_proj(x).relu(), mlp.up_proj(x)
        h = gate * (up.relu() if activation == "drelu" else up)
        kept = h * (h.abs() >= threshold)
        assert 0 < (kept != 0).sum() < (h != 0).sum()
        torch.testing.assert_close(mlp(x), mlp.down_proj(kept))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_keeps_its_thresholds(folder, tmp_path, dtype):
    model = _load(folder, dtype)
    assert [float(mlp.threshold) for mlp in ffns(model)] == [0.0, 0.25]
    assert not any("threshold" in name for name in model.state_dict())
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["activation_threshold"] == [0.0, 0.25]
    again = _load(tmp_path / "again", dtype)
    assert torch.equal(again(_IDS).logits, model(_IDS).logits)


@pytest.mark.parametrize("thresholds", [[0.1], [0.1, -0.1], [0.1, float("nan")], [0.1, float("inf")]])
def test_impossible_thresholds_are_errors(thresholds):
    with pytest.raises(ValueError, match="activation_threshold"):
        TurboSparseLlamaConfig(activation="drelu", num_hidden_layers=2, activation_threshold=thresholds)


@pytest.mark.parametrize("group", [1, 2])
def test_thresholds_are_set_from_the_size_of_each_layers_activations(tmp_path, group):
    changes = {"activation_threshold": [0.0, 0.25], "neurons_per_gate": group}
    model = _load(make_folder(tmp_path / "hf", "llama", "drelu", **changes))
    sizes = []
    for mlp in ffns(model):
        mlp.set_threshold(None)
        mlp.down_proj.register_forward_pre_hook(lambda _m, inputs: sizes.append(inputs[0].square().mean().sqrt()))
    with torch.no_grad():
        model(_IDS)
    expected = [0.5 * float(size) for size in sizes]
    set_thresholds(model, 0.5, [_IDS[:1], _IDS[1:]])
    assert model.config.activation_threshold == pytest.approx(expected, rel=1e-5)
    assert [float(mlp.threshold) for mlp in ffns(model)] == pytest.approx(expected, rel=1e-5)
    assert all(mlp.tap is None for mlp in ffns(model))


def test_validation_counts_what_the_threshold_drops(folder):
    model = _load(folder)
    zeros = validate(model, {"a": _IDS}, torch.device("cpu"), None)["a"]["sparsity_h"]
    for mlp in ffns(model):
        mlp.set_threshold(None)
    assert validate(model, {"a": _IDS}, torch.device("cpu"), None)["a"]["sparsity_h"] < zeros


def test_a_recipe_cannot_ask_for_a_negative_threshold():
    assert Sparsity(target_rate=0.1, threshold=0.3).threshold == 0.3
    with pytest.raises(ValueError, match="threshold"):
        Sparsity(target_rate=0.1, threshold=-0.3)
