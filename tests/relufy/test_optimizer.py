"""Muon on stacks of matrices, held to torch's own one-by-one Muon and to AdamW; AdamW with two learning rates."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from turbosparse.relufy.optimizer import Muon, make_adamw, orthogonalized
from turbosparse.relufy.recipes import Stage


@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8), (1, 7, 7), (4, 1, 5)])
def test_orthogonalized_keeps_directions_and_levels_their_sizes(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape) * torch.logspace(-3, 3, shape[0])[:, None, None]
    turned = orthogonalized(matrices)
    assert turned.shape == matrices.shape
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    sizes = torch.diagonal(left.mT @ turned @ right.mT, dim1=-2, dim2=-1)
    assert sizes.min() > 0.5 and sizes.max() < 1.3


def _train(optimizers, parameters, steps=5):
    torch.manual_seed(1)
    targets = [torch.randn_like(p) for p in parameters]
    for _ in range(steps):
        loss = sum(((p - t) ** 4).sum() for p, t in zip(parameters, targets, strict=True))
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()


def _parameters():
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in [(6, 10), (6, 10), (12, 5), (9,), (9, 4)]]


def _ours(parameters):
    return Muon(parameters[:3], parameters[3:], lr=0.02, weight_decay=0.1, betas=(0.9, 0.95), dtype=torch.bfloat16)


def test_every_update_is_that_of_torch():
    ours, theirs = _parameters(), _parameters()
    _train([_ours(ours)], ours)
    muon = torch.optim.Muon(theirs[:3], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(theirs[3:], lr=0.02, weight_decay=0.1, betas=(0.9, 0.95))
    _train([muon, adamw], theirs)
    for p, q in zip(ours[:3], theirs[:3], strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=5e-3)  # the iteration runs in bfloat16 on both sides
    for p, q in zip(ours[3:], theirs[3:], strict=True):
        torch.testing.assert_close(p, q)


def test_state_survives_a_checkpoint():
    whole, halves = _parameters(), _parameters()
    optimizer = _ours(whole)
    _train([optimizer], whole, 3)
    _train([optimizer], whole, 3)
    first = _ours(halves)
    _train([first], halves, 3)
    second = _ours(halves)
    second.load_state_dict(first.state_dict())
    _train([second], halves, 3)
    for p, q in zip(whole, halves, strict=True):
        assert torch.equal(p, q)


def test_ffns_learn_at_a_rate_of_their_own():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=1, **sizes))
    stage = Stage(name="train", objective="cross_entropy", tokens=1, learning_rate=1e-3, ffn_lr=2.0, weight_decay=0.1)
    settings = {id(p): group for group in make_adamw(model, stage).param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        assert settings[id(p)]["lr"] == (2e-3 if ".mlp." in name else 1e-3), name
        assert settings[id(p)]["weight_decay"] == (0.0 if "norm" in name else 0.1), name
