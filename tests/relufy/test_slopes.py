"""Soft slopes: the value of the sparse block, gradients also where it is off."""

import pytest
import torch
from factories import make_folder
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import turbosparse  # noqa: F401  registers the sparse model types
from turbosparse.errors import UserError
from turbosparse.relufy.objective import ffns
from turbosparse.relufy.slopes import soft_relu, use_soft_slopes, with_slope


def test_soft_relu_is_relu_with_the_slope_of_a_softplus():
    torch.manual_seed(0)
    x = (3 * torch.randn(2, 8, 5)).requires_grad_()
    y = soft_relu(x)
    torch.testing.assert_close(y.detach(), x.detach().relu())
    y.sum().backward()
    spread = x.detach()[:, ::8].std()
    torch.testing.assert_close(x.grad, torch.sigmoid(4 * x.detach() / (spread + 1e-6)))


@pytest.mark.parametrize("activation", ["drelu", "reglu"])
def test_a_block_computes_the_same_and_its_silent_neurons_learn(tmp_path, activation):
    model = AutoModelForCausalLM.from_pretrained(
        make_folder(tmp_path / "hf", "llama", activation, activation_threshold=[0.1, 0.3]), dtype=torch.float32
    )
    mlp = ffns(model)[0]
    x = torch.randn(2, 3, model.config.hidden_size)
    inverse = torch.linalg.pinv(x.flatten(0, 1))
    with torch.no_grad():  # neuron 4: gate just below zero, up 1, for every token
        mlp.gate_proj.weight[4], mlp.up_proj.weight[4] = inverse @ torch.full((6,), -0.01), inverse @ torch.ones(6)
        expected = mlp(x)
    F.mse_loss(mlp(x), torch.zeros_like(expected)).backward()
    assert (mlp.gate_proj.weight.grad[4] == 0).all()
    mlp.zero_grad()

    use_soft_slopes(model)
    seen = []
    mlp.tap = lambda gate, up, h: seen.append(h)
    output = mlp(x)
    with torch.no_grad():
        assert torch.equal(mlp(x), expected)
    assert torch.equal(seen[0], seen[1])  # h is the same bit for bit while it trains
    assert torch.equal(output, expected)
    F.mse_loss(output, torch.zeros_like(expected)).backward()
    assert (mlp.gate_proj.weight.grad[4] != 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_value_does_not_pass_through_arithmetic(dtype):
    value = torch.tensor([0.0, 1 / 3, 7.0], dtype=dtype)
    smooth = torch.tensor([1e9, 1e9, 1e-9], requires_grad=True)  # autocast computes a softplus in float32
    y = with_slope(value, smooth)
    assert y.dtype is dtype
    assert torch.equal(y, value)
    y.backward(torch.tensor([1.0, 2.0, 3.0], dtype=dtype))
    assert smooth.grad.tolist() == [1.0, 2.0, 3.0]


def test_a_dense_model_has_no_slopes_to_soften():
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    with pytest.raises(UserError, match="soft_slopes"):
        use_soft_slopes(LlamaForCausalLM(config))
