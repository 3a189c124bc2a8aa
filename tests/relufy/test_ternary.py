"""Ternary gates: the form, who learns, what is left at the end of a stage."""

from __future__ import annotations

import pytest
import torch
from factories import make_folder
from torch import nn
from transformers import AutoModelForCausalLM

import turbosparse  # noqa: F401  registers the sparse model types
from turbosparse.relufy.objective import ffns
from turbosparse.relufy.rounded import settle_rounded
from turbosparse.relufy.ternary import ternary, use_ternary_gates


def test_a_row_becomes_three_values_and_stays_so():
    rows = torch.tensor([[0.1, -2.0, 4.0, -0.1], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, -1.0, 1.0]])
    rounded = ternary(rows)
    assert rounded.tolist() == [[0.0, -3.0, 3.0, 0.0], [0.0] * 4, [1.0, 1.0, -1.0, 1.0]]
    assert torch.equal(ternary(rounded), rounded)


@pytest.mark.parametrize("columns", [1, 7, 576])
def test_rounding_twice_changes_no_sign_and_hardly_a_scale(columns):
    torch.manual_seed(columns)
    rounded = ternary(torch.randn(50, columns))
    for row in rounded:
        assert len(row[row != 0].abs().unique()) == 1
    again = ternary(rounded)
    assert torch.equal(again.sign(), rounded.sign())
    torch.testing.assert_close(again, rounded, rtol=1e-6, atol=0)


@pytest.mark.parametrize("group", [1, 3])
def test_the_copy_learns_and_the_model_ends_with_what_it_computed(tmp_path, group):
    folder = make_folder(tmp_path / "hf", "llama", "drelu", neurons_per_gate=group)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    mlp = ffns(model)[0]
    with torch.no_grad():
        mlp.gate_proj.weight.normal_(std=0.1)
    x = torch.randn(5, model.config.hidden_size)
    use_ternary_gates(model)
    gate = mlp.gate_proj(x)
    torch.testing.assert_close(gate, x @ ternary(mlp.gate_proj.weight).T)
    (weight,) = torch.randn(1, *gate.shape)
    (gate * weight).sum().backward()
    torch.testing.assert_close(mlp.gate_proj.weight.grad, weight.T @ x)  # also where the rounded weight is zero
    settle_rounded(model)
    assert type(mlp.gate_proj) is nn.Linear
    torch.testing.assert_close(mlp.gate_proj(x), gate)
    assert torch.equal(ternary(mlp.gate_proj.weight).sign(), mlp.gate_proj.weight.sign())
