"""Turning neurons: the dense function stays, the dReLU one comes closer to it."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from turbosparse.relufy.align import align_signs
from turbosparse.relufy.drelu import TurboSparseLlamaConfig, TurboSparseLlamaForCausalLM
from turbosparse.relufy.objective import ffns


@pytest.fixture(params=[False, True], ids=["no-bias", "bias"])
def pair(request: pytest.FixtureRequest) -> tuple[LlamaForCausalLM, TurboSparseLlamaForCausalLM]:
    """A dense model whose up projections prefer a side by chance, and its swap."""
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
    sparse = TurboSparseLlamaForCausalLM(TurboSparseLlamaConfig(activation="drelu", **sizes)).eval()
    sparse.load_state_dict(dense.state_dict())
    return dense, sparse


def _error(sparse_mlp: torch.nn.Module, dense_mlp: torch.nn.Module, x: torch.Tensor) -> float:
    y = dense_mlp(x)
    return ((sparse_mlp(x) - y).square().sum() / y.square().sum()).item()


@torch.no_grad()
def test_turning_keeps_the_dense_model_and_brings_drelu_closer(pair):
    dense, sparse = pair
    ids = torch.randint(40, (6, 64))
    inputs = []
    hooks = [mlp.register_forward_hook(lambda _m, x, _y: inputs.append(x[0])) for mlp in ffns(dense)]
    logits = dense(ids).logits
    for hook in hooks:
        hook.remove()
    before = [_error(s, d, x) for s, d, x in zip(ffns(sparse), ffns(dense), inputs, strict=True)]
    turned = align_signs(sparse, dense, ids.split(2))
    after = [_error(s, d, x) for s, d, x in zip(ffns(sparse), ffns(dense), inputs, strict=True)]
    assert 0.2 < turned < 0.8
    assert all(new < old for new, old in zip(after, before, strict=True))
    dense.load_state_dict(sparse.state_dict())
    torch.testing.assert_close(dense(ids).logits, logits, rtol=1e-4, atol=1e-5)
    assert align_signs(sparse, dense, ids.split(2)) == 0.0  # the better side already


@torch.no_grad()
def test_a_neuron_whose_up_is_always_negative_is_turned(pair):
    dense, sparse = pair
    for model in pair:
        for mlp in ffns(model):
            mlp.up_proj.weight.copy_(-mlp.gate_proj.weight)
            if mlp.up_proj.bias is not None:
                mlp.up_proj.bias.copy_(-mlp.gate_proj.bias)
    assert align_signs(sparse, dense, [torch.randint(40, (2, 64))]) > 0.9  # a gate that never opens decides nothing
    for mlp in ffns(sparse):
        turned = (mlp.up_proj.weight == mlp.gate_proj.weight).all(1)
        assert (turned | (mlp.up_proj.weight == -mlp.gate_proj.weight).all(1)).all() and turned.float().mean() > 0.9
