"""Pruned gates: those that are worth least go, with their neurons, and what is left is the same model."""

import pytest
import torch
from factories import make_folder
from transformers import AutoModelForCausalLM

import turbosparse  # noqa: F401  registers the sparse model types
from turbosparse.engine import Engine
from turbosparse.model.export import export_gguf
from turbosparse.relufy.objective import ffns
from turbosparse.relufy.prune import gates_kept, prune_gates
from turbosparse.relufy.validate import validate

_IDS = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(5))


def _model(folder, group, family="llama", **changes):
    changes = {"intermediate_size": 192, "neurons_per_gate": group} | changes
    make_folder(folder, family, "drelu", **changes)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _worth(model, group):
    """Energy that each gate brings into the output of its layer, neuron by neuron: [layers][gates]."""
    seen = []
    hooks = [
        mlp.down_proj.register_forward_pre_hook(lambda _m, x: seen.append(x[0].flatten(0, -2))) for mlp in ffns(model)
    ]
    with torch.no_grad():
        model(_IDS)
    for hook in hooks:
        hook.remove()
    worth = []
    for mlp, h_NF in zip(ffns(model), seen, strict=True):
        outputs = [(h_NF[:, f, None] * mlp.down_proj.weight[:, f]).square().sum().item() for f in range(h_NF.shape[1])]
        worth.append([sum(outputs[g : g + group]) for g in range(0, len(outputs), group)])
    return worth


@pytest.mark.parametrize(
    ("family", "group", "mirrored"),
    [("llama", 1, False), ("qwen2", 2, False), ("qwen3", 3, False), ("llama", 2, True), ("llama", 4, True)],
)
def test_the_gates_that_are_worth_most_stay_in_their_order(tmp_path, family, group, mirrored):
    model = _model(tmp_path / "hf", group, family, activation_threshold=[0.0, 0.05], mirrored_ups=mirrored)
    worth = _worth(model, group)
    before = [{name: weight.clone() for name, weight in mlp.named_parameters()} for mlp in ffns(model)]
    lost = prune_gates(model, 0.5, [_IDS[:1], _IDS[1:]])
    keep = 96 // group
    assert (model.config.intermediate_size, model.config.gate_rows()) == (96, keep)
    shares = []
    for mlp, values, old in zip(ffns(model), worth, before, strict=True):
        gates = sorted(sorted(range(len(values)), key=lambda g: -values[g])[:keep])
        neurons = [group * g + i for g in gates for i in range(group)]
        assert torch.equal(mlp.gate_proj.weight, old["gate_proj.weight"][gates])
        ups = [neuron // 2 for neuron in neurons[::2]] if mirrored else neurons
        assert torch.equal(mlp.up_proj.weight, old["up_proj.weight"][ups])
        assert torch.equal(mlp.down_proj.weight, old["down_proj.weight"][:, neurons])
        shares.append(1 - sum(values[g] for g in gates) / sum(values))
        assert mlp.tap is None
    assert lost == pytest.approx(sum(shares) / len(shares), rel=1e-3) and 0 < lost < 0.5


@pytest.mark.parametrize("group", [1, 2])
def test_gates_that_do_nothing_cost_nothing(tmp_path, group):
    model = _model(tmp_path / "hf", group)
    idle = torch.randperm(192 // group, generator=torch.Generator().manual_seed(1))[: 64 // group]
    with torch.no_grad():
        for mlp in ffns(model):
            mlp.down_proj.weight.view(-1, 192 // group, group)[:, idle] = 0
        expected = model(_IDS).logits
        assert prune_gates(model, 0.3, [_IDS]) == pytest.approx(0, abs=1e-6)
        assert model.config.intermediate_size == 128  # 134.4 in whole blocks
        torch.testing.assert_close(model(_IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_pruned_model_is_saved_exported_and_run(tmp_path):
    model = _model(tmp_path / "hf", 2)
    for name in (tmp_path / "hf").glob("tokenizer*"):
        (tmp_path / "pruned").mkdir(exist_ok=True)
        (tmp_path / "pruned" / name.name).write_bytes(name.read_bytes())
    prune_gates(model, 0.4, [_IDS])
    model.save_pretrained(tmp_path / "pruned")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype=torch.float32)
    assert torch.equal(again(_IDS).logits, model(_IDS).logits)
    assert 0 < validate(again, {"a": _IDS}, torch.device("cpu"), None)["a"]["sparsity_h"] < 1
    export_gguf(tmp_path / "pruned", tmp_path / "m.gguf", "f32")
    session = Engine.load(tmp_path / "m.gguf", compute="f32", threads=1).session()
    logits = session.prefill(_IDS[0].tolist(), "exact")
    torch.testing.assert_close(torch.from_numpy(logits), model(_IDS[:1]).logits[0, -1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("neurons", "group", "share", "kept"),
    [
        (4608, 2, 0.25, 1728),
        (192, 1, 0.5, 96),
        (192, 3, 0.5, 32),
        (100, 1, 0.1, 64),
        (192, 2, 0.9, 0),
        (192, 1, 1e-9, 192),
    ],
)
def test_neurons_are_whole_blocks(neurons, group, share, kept):
    assert gates_kept(neurons, group, share) == kept


def test_some_gate_must_stay(tmp_path):
    with pytest.raises(ValueError, match=r"0\.9 of 96 gates leaves none"):
        prune_gates(_model(tmp_path / "hf", 2), 0.9, [_IDS])
