"""Folders as sparse models were published: they become the model that they are, and no code of theirs runs."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from agreement import TOKENS, equal_bits, logits_error
from folders import edit_config, edit_weights
from published_folders import LAYOUTS, RANK, published_folder
from safetensors.numpy import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

from turbosparse.engine import Engine
from turbosparse.errors import UserError
from turbosparse.model.config import ModelConfig, Predictor
from turbosparse.model.export import export_gguf
from turbosparse.model.export_powerinfer import export_powerinfer
from turbosparse.model.gguf import GGUFFile
from turbosparse.model.import_powerinfer import import_model
from turbosparse.model.quantize import dequantize

# Family, activation, and the gate's threshold of each layout.
EXPECTED = {
    "bamboo": ("mistral", "drelu", 0.0),
    "turbosparse-mixtral": ("mixtral", "drelu", 0.0),
    "relullama": ("llama", "reglu", 0.0),
    "prosparse": ("llama", "reglu", float(np.float32(0.1))),
}


def _config(path):
    with GGUFFile.open(path) as file:
        return ModelConfig.from_gguf(file)


def _activation(layout):
    double = EXPECTED[layout][1] == "drelu"

    def h(gate, up):
        opened = torch.where(gate >= EXPECTED[layout][2], torch.relu(gate), 0.0)
        return opened * (torch.relu(up) if double else up)

    return h


def _reference(folder, dense, layout):
    """Logits of transformers' dense model of the same weights, with the activation of the layout put in."""
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32, attn_implementation="eager")
    h = _activation(layout)
    weights = {name: torch.from_numpy(array) for name, array in load_file(folder / "model.safetensors").items()}
    for index, layer in enumerate(model.model.layers):

        def ffn(x, at=f"model.layers.{index}.mlp."):
            gate, up, down = (weights[f"{at}{name}_proj.weight"] for name in ("gate", "up", "down"))
            return functional.linear(h(functional.linear(x, gate), functional.linear(x, up)), down)

        layer.mlp.forward = ffn
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0].numpy()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_config_says_which_model_it_is(tmp_path, layout):
    folder = published_folder(tmp_path / "hf", layout)
    config = ModelConfig.from_hf(json.loads((folder / "config.json").read_text()))
    assert (config.family, config.activation, config.gate_threshold) == EXPECTED[layout]
    export_gguf(folder, tmp_path / "a.gguf", "f32")
    assert _config(tmp_path / "a.gguf") == config
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("layout", ["bamboo", "relullama", "prosparse"])
def test_it_computes_what_its_definition_says(tmp_path, tiny_folder, layout):
    folder = published_folder(tmp_path / "hf", layout)
    import_model(folder, tmp_path / "a.gguf", "f16", None)
    export_gguf(folder, tmp_path / "b.gguf", "f32")
    theirs = _reference(folder, tiny_folder(EXPECTED[layout][0]), layout)
    engine = Engine.load(tmp_path / "b.gguf", compute="f32", threads=2)
    exact = engine.session().logits(TOKENS, "exact")
    assert logits_error(exact, theirs).max() < 1e-4
    assert equal_bits(engine.session().logits(TOKENS, "dense"), exact)
    single = engine.session()
    assert equal_bits(np.stack([single.decode(token, "exact") for token in TOKENS]), exact)
    assert logits_error(Engine.load(tmp_path / "a.gguf").session().logits(TOKENS), theirs).max() < 0.05


def test_a_gate_threshold_silences_neurons_and_counts_them_so(tmp_path):
    silent = []
    for threshold in (0.0, 0.1, 1.0):
        folder = published_folder(tmp_path / f"hf{threshold}", "prosparse", hidden_act_param=threshold)
        export_gguf(folder, tmp_path / f"{threshold}.gguf", "q8_0")
        with GGUFFile.open(tmp_path / f"{threshold}.gguf") as file:
            assert file.metadata["turbosparse.format_version"] == (3 if threshold else 1)
        engine = Engine.load(tmp_path / f"{threshold}.gguf")
        engine.count_activations()
        engine.session().logits(TOKENS, "exact")
        counts = engine.counters()
        assert np.array_equal(counts.gate, counts.h)  # of ReGLU: a neuron fires where its gate is open
        silent.append(1 - counts.h.mean() / len(TOKENS))
    assert 0.45 < silent[0] < silent[1] - 0.02 < silent[2] - 0.1


@pytest.mark.parametrize("layout", ["bamboo", "turbosparse-mixtral"])
def test_predictors_beside_the_ffn_come_along(tmp_path, layout):
    folder = published_folder(tmp_path / "hf", layout, predictors=True)
    import_model(folder, tmp_path / "a.gguf", "f16", 0.25)
    export_gguf(folder, tmp_path / "b.gguf", "f32")
    config = _config(tmp_path / "a.gguf")
    ffns = 2 * config.ffns
    assert config.predictor == Predictor((RANK, RANK), (0.25,) * ffns, "residual")
    assert _config(tmp_path / "b.gguf").predictor.thresholds == (0.0,) * ffns  # where nobody states one
    weights = load_file(folder / "model.safetensors")
    with GGUFFile.open(tmp_path / "b.gguf") as file:
        for part in ("fc1", "fc2"):
            if layout == "bamboo":
                tensor, wanted = (
                    file.tensors[f"blk.1.{part}.weight"],
                    weights[f"model.layers.1.mlp.predictor.{part}.weight"],
                )
            else:
                tensor = file.tensors[f"blk.1.{part}_exps.weight"]
                name = "model.layers.1.block_sparse_moe.experts.{}.predictor.{}.weight"
                wanted = np.stack([weights[name.format(expert, part)] for expert in range(5)])
            np.testing.assert_array_equal(dequantize(tensor.data, tensor.type, tensor.shape), wanted)
    engine = Engine.load(tmp_path / "a.gguf", threads=2)
    assert engine.modes == ("dense", "exact", "predicted")
    assert not np.allclose(engine.session().logits(TOKENS, "predicted"), engine.session().logits(TOKENS, "exact"))


def test_a_published_folder_goes_to_powerinfer(tmp_path):
    folder = published_folder(tmp_path / "hf", "bamboo", predictors=True, ffn=1024)
    export_powerinfer(folder, tmp_path / "a.gguf", "f16")
    export_gguf(folder, tmp_path / "b.gguf", "f16")
    theirs, ours = _config(tmp_path / "a.gguf"), _config(tmp_path / "b.gguf")
    assert replace(theirs, sliding_window=ours.sliding_window, sliding_layers=ours.sliding_layers) == ours
    first, second = (Engine.load(tmp_path / name, threads=2) for name in ("a.gguf", "b.gguf"))
    for mode in first.modes:
        assert equal_bits(first.session().logits(TOKENS, mode), second.session().logits(TOKENS, mode)), mode


BROKEN = {
    "one predictor missing": (lambda w: w.pop("model.layers.1.mlp.predictor.fc2.weight"), r"predictor\.fc2"),
    "a predictor of another input": (
        lambda w: w.update({"model.layers.1.mlp.predictor.fc1.weight": np.zeros((RANK, 32), "f4")}),
        "shape",
    ),
    "a predictor that is no matrix": (
        lambda w: w.update({"model.layers.0.mlp.predictor.fc1.weight": np.zeros(64, "f4")}),
        "shape",
    ),
    "a predictor of no width": (
        lambda w: w.update({"model.layers.0.mlp.predictor.fc1.weight": np.zeros((0, 64), "f4")}),
        "shape",
    ),
    "a bias that no such predictor has": (
        lambda w: w.update({"model.layers.0.mlp.predictor.fc1.bias": np.zeros(RANK, "f4")}),
        r"fc1\.bias",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_predictor_that_cannot_be_is_one_sentence(tmp_path, case):
    folder = published_folder(tmp_path / "hf", "bamboo", predictors=True)
    damage, named = BROKEN[case]
    edit_weights(folder, damage)
    with pytest.raises(UserError, match=named) as caught:
        import_model(folder, tmp_path / "a.gguf", "f16", None)
    assert "\n" not in str(caught.value) and not (tmp_path / "a.gguf").exists()


@pytest.mark.parametrize(
    ("layout", "changes", "named"),
    [
        ("bamboo", {"hidden_act": "silu"}, "not relu"),
        ("bamboo", {"hidden_act": None}, "hidden_act"),
        ("turbosparse-mixtral", {"hidden_act": "silu"}, "not relu"),
        ("prosparse", {"hidden_act": "shiftrelu"}, "not relu or fatrelu"),
        ("prosparse", {"hidden_act_param": -1.0}, "hidden_act_param"),
        ("prosparse", {"hidden_act_param": None}, "hidden_act_param"),
        ("prosparse", {"hidden_act_param": "0.01"}, "hidden_act_param"),
        ("bamboo", {"num_hidden_layers": 1 << 40}, "num_hidden_layers"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_is_one_sentence(tmp_path, layout, changes, named):
    folder = published_folder(tmp_path / "hf", layout)
    edit_config(folder, **changes)
    with pytest.raises(UserError, match=named) as caught:
        import_model(folder, tmp_path / "a.gguf", None, None)
    assert "\n" not in str(caught.value) and not (tmp_path / "a.gguf").exists()
