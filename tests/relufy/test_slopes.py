"""Soft slopes: the value of the sparse block, gradients also where it is off."""

import pytest
import torch
from factories import make_folder
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import turbosparse  # noqa: F401  registers the sparse model types
from turbosparse.errors import UserError
from turbosparse.relufy.objective import ffns
from turbosparse.relufy.slopes import use_soft_slopes, with_soft_slopes


def soft_relu(x, spread):
    """relu(x) as a softplus whose value is replaced: the gradient is written nowhere, autograd finds it."""
    smooth = F.softplus(4 / spread * x) * spread / 4
    return smooth + (torch.relu(x) - smooth).detach()


@pytest.mark.parametrize("both", [True, False])
def test_the_gradient_is_that_of_softplus(both):
    torch.manual_seed(0)
    gate, up, weight = (3 * torch.randn(2, 8, 5, dtype=torch.float64) for _ in range(3))
    gate, up = gate.requires_grad_(), up.requires_grad_()
    spread = [x.detach()[:, ::8].std() + 1e-6 for x in (gate, up)]
    expected = soft_relu(gate, spread[0]) * (soft_relu(up, spread[1]) if both else up)
    wanted = torch.autograd.grad((expected * weight).sum(), (gate, up))
    h = torch.where(expected.detach() < 0.1, 0.0, expected.detach())
    y = with_soft_slopes(h, gate, up, both)
    assert torch.equal(y, h)
    for got, want in zip(torch.autograd.grad((y * weight).sum(), (gate, up)), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)  # standard deviations are float32


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
def test_value_and_gradients_keep_their_dtype(dtype):
    gate, up = (torch.randn(1, 8, 6).to(dtype).requires_grad_() for _ in range(2))
    kept = []
    with (
        torch.autocast("cpu", dtype=dtype, enabled=dtype is torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor),
    ):
        h = with_soft_slopes(torch.relu(gate) * torch.relu(up), gate, up, True)
    assert torch.equal(h, torch.relu(gate) * torch.relu(up))
    h.backward(torch.ones_like(h))
    assert {h.dtype, gate.grad.dtype, up.grad.dtype, *(tensor.dtype for tensor in kept)} == {dtype}


def test_a_dense_model_has_no_slopes_to_soften():
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    with pytest.raises(UserError, match="soft_slopes"):
        use_soft_slopes(LlamaForCausalLM(config))
