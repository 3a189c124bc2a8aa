"""Neurons allotted: the layer comes closer to the dense one, and nothing else changes."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from turbosparse.relufy.allot import allot_neurons
from turbosparse.relufy.drelu import TurboSparseLlamaConfig, TurboSparseLlamaForCausalLM
from turbosparse.relufy.objective import ffns


@pytest.fixture(params=[False, True], ids=["no-bias", "bias"])
def pair(request: pytest.FixtureRequest) -> tuple[LlamaForCausalLM, TurboSparseLlamaForCausalLM]:
    """A dense model whose neurons prefer sides by chance, and its swap."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 37, "num_hidden_layers": 3, "vocab_size": 40}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "mlp_bias": request.param}
    dense = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    with torch.no_grad():
        for mlp in ffns(dense):
            mlp.gate_proj.weight *= 20
            mlp.up_proj.weight *= 20
            if request.param:
                mlp.up_proj.bias.normal_(std=2)
                mlp.gate_proj.bias.normal_(std=2)
    sparse = TurboSparseLlamaForCausalLM(TurboSparseLlamaConfig(activation="drelu", **sizes)).eval()
    sparse.load_state_dict(dense.state_dict())
    return dense, sparse


def _inputs(dense, ids):
    seen = []
    hooks = [mlp.register_forward_hook(lambda _m, x, _y: seen.append(x[0])) for mlp in ffns(dense)]
    dense(ids)
    for hook in hooks:
        hook.remove()
    return seen


def _error(sparse_mlp: torch.nn.Module, dense_mlp: torch.nn.Module, x: torch.Tensor) -> float:
    y = dense_mlp(x)
    return ((sparse_mlp(x) - y).square().sum() / y.square().sum()).item()


@torch.no_grad()
def test_every_layer_comes_closer_and_the_rest_stays(pair):
    dense, sparse = pair
    ids = torch.randint(40, (6, 64))
    inputs = _inputs(dense, ids)
    before = [_error(*each) for each in zip(ffns(sparse), ffns(dense), inputs, strict=True)]
    unused = allot_neurons(sparse, dense, ids.split(2))
    after = [_error(*each) for each in zip(ffns(sparse), ffns(dense), inputs, strict=True)]
    assert 0.05 < unused < 0.7
    assert all(new < 0.6 * old for new, old in zip(after, before, strict=True))
    for name, weight in sparse.state_dict().items():
        if ".mlp." not in name:
            torch.testing.assert_close(weight, dense.state_dict()[name], rtol=0, atol=0)


@torch.no_grad()
def test_a_neuron_on_its_unusual_sides_is_found(pair):
    """A dense neuron that lives where the gate is negative, or up, becomes a dReLU neuron that fires there."""
    dense, sparse = pair
    for model in pair:
        for mlp in ffns(model):
            mlp.up_proj.weight.copy_(-mlp.gate_proj.weight)
            if mlp.up_proj.bias is not None:
                mlp.up_proj.bias.copy_(-mlp.gate_proj.bias)
    ids = torch.randint(40, (4, 64))
    inputs = _inputs(dense, ids)
    assert all(mlp(x).abs().max() == 0 for mlp, x in zip(ffns(sparse), inputs, strict=True))  # never both positive
    allot_neurons(sparse, dense, [ids])
    assert all(_error(*each) < 0.3 for each in zip(ffns(sparse), ffns(dense), inputs, strict=True))


@torch.no_grad()
def test_a_wider_layer_comes_closer_and_is_stored_as_it_is(pair, tmp_path):
    dense, sparse = pair
    ids = torch.randint(40, (6, 64))
    inputs = _inputs(dense, ids)
    errors = []
    for width, neurons in ((1, 37), (2, 64), (4, 128)):  # 74 and 148 in whole blocks of 32
        wide = copy.deepcopy(sparse)
        allot_neurons(wide, dense, ids.split(2), width=width)
        assert wide.config.intermediate_size == wide.model.layers[0].mlp.up_proj.out_features == neurons
        errors.append([_error(*each) for each in zip(ffns(wide), ffns(dense), inputs, strict=True)])
        _check_stored(wide, ids, tmp_path / str(width))
    narrow, double, whole = errors
    assert all(c < a < 0.8 * b for a, b, c in zip(double, narrow, whole, strict=True)), errors


@pytest.mark.parametrize("sides_of_pairs", ["pairs", "mirrored"])
@torch.no_grad()
def test_pairs_share_their_gates_and_come_closer_than_as_many_gates_of_single_sides(pair, tmp_path, sides_of_pairs):
    dense, sparse = pair
    ids = torch.randint(40, (6, 64))
    inputs = _inputs(dense, ids)
    errors = []
    for sides, width in (("best", 1), (sides_of_pairs, 2)):
        student = copy.deepcopy(sparse)
        unused = allot_neurons(student, dense, ids.split(2), sides=sides, width=width)
        assert 0.05 < unused < 0.7
        errors.append([_error(*each) for each in zip(ffns(student), ffns(dense), inputs, strict=True)])
    assert student.config.intermediate_size == 64 and student.config.neurons_per_gate == 2
    assert student.config.mirrored_ups == (sides_of_pairs == "mirrored")
    for mlp, x in zip(ffns(student), inputs, strict=True):
        ups = 32 if sides_of_pairs == "mirrored" else 64
        assert (mlp.gate_proj.out_features, mlp.up_proj.out_features, mlp.neurons_per_gate) == (32, ups, 2)
        first, second = mlp.ups(x).unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.nn.functional.cosine_similarity(first, second, dim=1)
        torch.testing.assert_close(turned, -torch.ones_like(turned))  # both signs of one up
    assert all(pairs < best for best, pairs in zip(*errors, strict=True)), errors
    _check_stored(student, ids, tmp_path)


@torch.no_grad()
def test_mirrored_pairs_give_what_pairs_do(pair):
    dense, sparse = pair
    ids, outputs = torch.randint(40, (6, 64)), []
    inputs = _inputs(dense, ids)
    for sides in ("pairs", "mirrored"):
        student = copy.deepcopy(sparse)
        allot_neurons(student, dense, ids.split(2), sides=sides, width=2)
        outputs.append([mlp(x) for mlp, x in zip(ffns(student), inputs, strict=True)])
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_pairs_of_an_odd_number_of_neurons_are_whole(pair, tmp_path):
    dense, sparse = pair
    ids = torch.randint(40, (6, 64))
    allot_neurons(sparse, dense, ids.split(2), sides="pairs")
    assert sparse.config.intermediate_size == 36  # of 37
    assert all((mlp.gate_proj.out_features, mlp.up_proj.out_features) == (18, 36) for mlp in ffns(sparse))
    _check_stored(sparse, ids, tmp_path)


def _check_stored(student, ids, folder):
    logits = student(ids).logits
    student.save_pretrained(folder)
    again = TurboSparseLlamaForCausalLM.from_pretrained(folder)
    assert again.config.neurons_per_gate == student.config.neurons_per_gate
    assert again.config.mirrored_ups == student.config.mirrored_ups
    assert torch.equal(again(ids).logits, logits)
