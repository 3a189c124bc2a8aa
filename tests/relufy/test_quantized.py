"""Weights that train as a file of Q4_0 holds them."""

import numpy as np
import pytest
import torch
from factories import make_folder
from torch import nn
from transformers import AutoModelForCausalLM

import turbosparse  # noqa: F401  registers the sparse model types
from turbosparse.model.quantize import Type, dequantize, quantize
from turbosparse.relufy.objective import ffns
from turbosparse.relufy.quantized import q4_0, q8_0, use_q4_0
from turbosparse.relufy.rounded import settle_rounded
from turbosparse.relufy.ternary import TernaryGate, use_ternary_gates


def _through_a_file(weight: torch.Tensor, kind: Type = Type.Q4_0) -> torch.Tensor:
    return torch.from_numpy(dequantize(quantize(weight.numpy(), kind).reshape(-1), kind, tuple(weight.shape)))


# The smallest sizes have scales near float16's smallest normal number; below it, Q8_0's 127 steps need more digits.
@pytest.mark.parametrize(
    ("kind", "rounding", "size"),
    [(Type.Q4_0, q4_0, size) for size in (1e-4, 0.05, 30.0)] + [(Type.Q8_0, q8_0, size) for size in (0.01, 0.05, 30.0)],
)
@pytest.mark.parametrize("columns", [32, 96, 576])
def test_a_rounded_weight_comes_through_a_file_as_it_is(kind, rounding, size, columns):
    torch.manual_seed(columns)
    weight = torch.randn(40, columns) * size
    rounded = rounding(weight)
    assert torch.equal(_through_a_file(rounded, kind), rounded)
    assert torch.equal(rounding(rounded), rounded)
    assert (rounded - weight).norm() < (0.12 if kind is Type.Q4_0 else 0.01) * weight.norm()


def test_a_rounded_weight_is_near():
    torch.manual_seed(0)
    weight = torch.randn(64, 64)
    step = weight.reshape(-1, 32).abs().amax(1, keepdim=True) / 8
    off = (q4_0(weight) - weight).reshape(-1, 32).abs() / step
    # Half a step, but for the one side of the largest entry, where the levels end at 7.
    assert off.max() <= 1.01
    assert (off > 0.51).float().mean() < 0.05


def test_blocks_of_zeros_of_one_value_and_below_half_precision():
    for block in (torch.zeros(32), torch.full((32,), -3.0), torch.full((32,), 1e-12), torch.tensor([0.5, -0.5] * 16)):
        rounded = q4_0(block[None])
        assert torch.isfinite(rounded).all()
        assert torch.equal(q4_0(rounded), rounded)
        assert torch.equal(_through_a_file(rounded), rounded)
    assert q4_0(torch.zeros(1, 32)).abs().max() == 0
    np.testing.assert_array_equal(q4_0(torch.full((1, 32), -3.0)), -3.0)


def test_the_copy_learns_and_the_model_ends_with_what_it_computed(tmp_path):
    folder = make_folder(tmp_path / "hf", "llama", "drelu", hidden_size=64, intermediate_size=96)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    use_ternary_gates(model)
    use_q4_0(model)
    mlp = ffns(model)[0]
    assert type(mlp.gate_proj) is TernaryGate
    x = torch.randn(5, 64)
    up = mlp.up_proj(x)
    torch.testing.assert_close(up, x @ q4_0(mlp.up_proj.weight).T)
    (weight,) = torch.randn(1, *up.shape)
    (up * weight).sum().backward()
    torch.testing.assert_close(mlp.up_proj.weight.grad, weight.T @ x)
    ids = torch.randint(model.config.vocab_size, (1, 9))
    with torch.no_grad():
        logits = model(ids).logits
        settle_rounded(model)
        torch.testing.assert_close(model(ids).logits, logits)
    projections = [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)]
    assert all(type(module) is nn.Linear for module in projections)
    for projection in projections:
        torch.testing.assert_close(_through_a_file(projection.weight.detach()), projection.weight, rtol=5e-4, atol=0)
