"""Gate and up trade places: the same model, with gates that open less often."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from turbosparse.relufy.drelu import TurboSparseLlamaConfig, TurboSparseLlamaForCausalLM
from turbosparse.relufy.objective import ffns
from turbosparse.relufy.roles import settle_roles
from turbosparse.relufy.sparsity import ActivationTap

_SIZES = {"hidden_size": 16, "intermediate_size": 37, "num_hidden_layers": 3, "vocab_size": 40}
_SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1}


def _rates(model, ids):
    taps = [ActivationTap("drelu", None) for _ in ffns(model)]
    for mlp, tap in zip(ffns(model), taps, strict=True):
        mlp.tap = tap
    model(ids)
    return torch.stack([tap.rates for tap in taps])


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
def test_the_model_computes_the_same_behind_quieter_gates(bias):
    torch.manual_seed(0)
    config = TurboSparseLlamaConfig(activation="drelu", mlp_bias=bias, **_SIZES)
    model = TurboSparseLlamaForCausalLM(config).eval()
    if bias:
        for mlp in ffns(model):
            mlp.gate_proj.bias.normal_(std=0.1)
            mlp.up_proj.bias.normal_(std=0.1)
    ids = torch.randint(40, (4, 64))
    logits, before = model(ids).logits, _rates(model, ids)
    tap = ffns(model)[0].tap
    assert 0.2 < settle_roles(model, [ids]) < 0.8
    assert ffns(model)[0].tap is tap
    after = _rates(model, ids)
    torch.testing.assert_close(model(ids).logits, logits)
    assert (after[:, 0] < before[:, 0]).all() and (after[:, 0] < after[:, 1]).all()
    torch.testing.assert_close(after[:, 2], before[:, 2])  # as many neurons fire
    assert settle_roles(model, [ids]) == 0.0


@torch.no_grad()
def test_where_up_has_no_threshold_nothing_moves():
    torch.manual_seed(0)
    reglu = TurboSparseLlamaForCausalLM(TurboSparseLlamaConfig(activation="reglu", **_SIZES))
    dense = LlamaForCausalLM(LlamaConfig(**_SIZES))
    for model in (reglu, dense):
        weights = copy.deepcopy(model.state_dict())
        assert settle_roles(model, [torch.randint(40, (2, 16))]) == 0.0
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, weights[name])


@torch.no_grad()
def test_a_gate_of_several_neurons_stays_one():
    torch.manual_seed(0)
    sizes = _SIZES | {"intermediate_size": 36}
    model = TurboSparseLlamaForCausalLM(TurboSparseLlamaConfig(activation="drelu", neurons_per_gate=3, **sizes))
    weights = copy.deepcopy(model.state_dict())
    assert settle_roles(model, [torch.randint(40, (2, 16))]) == 0.0
    assert weights["model.layers.0.mlp.gate_proj.weight"].shape == (12, 16)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name])
