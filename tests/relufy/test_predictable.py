"""Predictors beside the model: they learn what fires, the model learns to agree, and neither by the other's loss."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import turbosparse  # noqa: F401  registers the sparse model types
from turbosparse.errors import UserError
from turbosparse.relufy.allot import allot_neurons
from turbosparse.relufy.objective import NextToken, ffns, last_hidden
from turbosparse.relufy.predictable import Predictors, missed_share, rank_for, sampled
from turbosparse.relufy.recipes import Predictability
from turbosparse.relufy.slopes import use_soft_slopes
from turbosparse.relufy.validate import validate

_CPU = torch.device("cpu")


def _ids(windows: int = 16) -> torch.Tensor:
    return torch.randint(64, (windows, 64), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "drelu", dtype=torch.float32)


def _watched(model, **settings) -> tuple[NextToken, Predictors]:
    """The objective of a stage with this option, and its predictors."""
    predictors = Predictors(model, Predictability(**{"ramp": 0.0} | settings))
    predictors.begin([_ids()], seed=3)
    return NextToken(model, None, agreement=predictors), predictors


def _penalty(model, predictors, ids) -> torch.Tensor:
    last_hidden(model, ids, None)
    return predictors.penalty(1.0, {})


def _batch(ids) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "domain": torch.zeros(len(ids), dtype=torch.long)}


def test_they_start_in_float32_whatever_the_model_computes_in(model):
    predictors = Predictors(model, Predictability())
    with torch.autocast("cpu", torch.bfloat16):  # as a GPU's training has it, whose decompositions refuse bfloat16
        predictors.begin([_ids()], 3, torch.bfloat16)
    assert all(layer.fc1.dtype == layer.fc2.dtype == torch.float32 for layer in predictors.layers)


def test_a_sample_leaves_out_the_first_token_but_is_never_empty():
    x = torch.arange(20.0)[None, :, None]
    assert sampled(x, 8).flatten().tolist() == [4, 12]
    assert sampled(x[:, :4], 1).flatten().tolist() == [1, 2, 3]
    assert sampled(x[:, :1], 8).flatten().tolist() == [0]


def test_missed_share_does_not_fall_with_the_size_of_h_and_moves_it_to_where_it_is_expected():
    mass = torch.tensor([[1.0, 2.0, 1.0]], requires_grad=True)
    score = torch.tensor([[5.0, -5.0, 5.0]], requires_grad=True)
    missed = missed_share(mass, score, torch.tensor(0.0))
    assert missed.item() == pytest.approx(0.5, abs=1e-3)
    assert missed_share(7 * mass, score, torch.tensor(0.0)).item() == pytest.approx(missed.item())
    missed.backward()
    assert mass.grad[0, 1] > 0 and (mass.grad[0, [0, 2]] < 0).all()
    assert score.grad is None


def test_the_model_learns_from_the_term_only(model):
    twin = copy.deepcopy(model)
    objective, predictors = _watched(model, weight=0.0)
    objective(model, _batch(_ids(4)), 0.5).total.backward()
    NextToken(twin, None)(twin, _batch(_ids(4)), 0.5).total.backward()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    assert not any(tensor.requires_grad for layer in predictors.layers for tensor in (layer.fc1, layer.fc2))


@pytest.mark.parametrize("soft", [False, True])
def test_the_term_reaches_silent_neurons_only_by_soft_slopes(model, soft):
    if soft:
        use_soft_slopes(model)
    _, predictors = _watched(model)
    mlp, fires = ffns(model)[-1], []
    mlp.down_proj.register_forward_hook(lambda _module, inputs, _output: fires.append(sampled(inputs[0], 8) != 0))
    gates = []
    mlp.gate_proj.register_forward_hook(lambda _module, _inputs, output: gates.append(output))
    mlp.gate_proj.register_forward_hook(lambda _module, _inputs, output: output.retain_grad())
    _penalty(model, predictors, _ids(2)).backward()
    felt = sampled(gates[0].grad, 8) != 0
    assert felt.any()
    assert (felt & ~fires[0]).any() == soft


def test_gradients_are_those_of_the_loss_of_train_predictors(model):
    from torch.nn import functional as F

    from turbosparse.predict.fit import COST

    _, predictors = _watched(model)
    layer, mlp = predictors.layers[0], ffns(model)[0]
    with torch.no_grad():
        layer.fc2 = layer.fc2 + 0.3 * torch.randn(layer.fc2.shape)
    seen = []
    mlp.down_proj.register_forward_hook(lambda _module, inputs, _output: seen.append(sampled(inputs[0], 8).detach()))
    mlp.register_forward_pre_hook(lambda _module, inputs: seen.append(sampled(inputs[0], 8).detach()))
    last_hidden(model, _ids(4), None)
    x, h = seen
    fc1, fc2 = (matrix.clone().requires_grad_() for matrix in (layer.fc1, layer.fc2))
    m, score = h / h.mean(), torch.relu(x @ fc1.T) @ fc2.T
    (m * F.softplus(-score) + COST * F.softplus(score)).sum(1).mean().backward()
    torch.testing.assert_close(layer.lesson[0], fc1.grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(layer.lesson[1], fc2.grad, rtol=1e-3, atol=1e-5)


def _plant(model, rank: int) -> None:
    """Gates and ups of one sign, of a low rank: what fires is told by a few numbers."""
    torch.manual_seed(2)
    for mlp in ffns(model):
        neurons, hidden = mlp.gate_proj.weight.shape
        weight = torch.randn(neurons, rank) @ torch.randn(rank, hidden) / hidden**0.5
        with torch.no_grad():
            mlp.gate_proj.weight.copy_(weight)
            mlp.up_proj.weight.copy_(weight)


def _learn(model, predictors, steps: int, optimizer=None) -> None:
    for step in range(steps):
        penalty = _penalty(model, predictors, _ids()[step % 4 :: 4])
        if optimizer is not None:
            optimizer.zero_grad()
            penalty.backward()
            optimizer.step()
        predictors.step(1.0)


def _selected(model, predictors) -> float:
    return validate(model, {"a": _ids()}, _CPU, None, predictors.layers)["a"]["selected_98"]


def test_predictors_learn_a_planted_set_of_low_rank(model):
    _plant(model, 2)
    _, predictors = _watched(model, selected=1.2)
    before = _selected(model, predictors)
    _learn(model, predictors, 200)
    after = _selected(model, predictors)
    assert after < 1.15 < before
    last_hidden(model, _ids(), None)
    selected, fires = predictors.layers[0].lesson[2]
    assert selected / fires == pytest.approx(1.2, rel=0.1)  # the threshold has moved there


@pytest.mark.parametrize("sides", ["one", "pairs"])
def test_a_model_learns_to_be_predictable(model, folder, sides):
    dense = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32)
    allot_neurons(model, dense, [_ids()], sides=sides)
    assert ffns(model)[0].gate_proj.out_features == (48 if sides == "pairs" else 96)
    twin = copy.deepcopy(model)
    results = []
    for student, weight in ((model, 1.0), (twin, 0.0)):
        use_soft_slopes(student)
        _, predictors = _watched(student, weight=weight)
        _learn(student, predictors, 100, torch.optim.Adam(student.parameters(), lr=1e-3))
        results.append(_selected(student, predictors))
    assert results[0] < 0.8 * results[1]


def test_saved_predictors_go_on_as_if_nothing_had_happened(model, tmp_path):
    twin = copy.deepcopy(model)
    _, first = _watched(model)
    _learn(model, first, 3)
    first.save(tmp_path / "state.pt")
    second = Predictors(twin, Predictability(ramp=0.0))
    NextToken(twin, None, agreement=second)
    second.load(tmp_path / "state.pt")
    for student, predictors in ((model, first), (twin, second)):
        _learn(student, predictors, 2)
    for mine, theirs in zip(first.layers, second.layers, strict=True):
        assert torch.equal(mine.fc1, theirs.fc1) and torch.equal(mine.fc2, theirs.fc2)
        assert torch.equal(mine.threshold, theirs.threshold)


def test_compiled_blocks_do_the_same(model):
    _, predictors = _watched(model)
    ids = _ids(2)
    expected = _penalty(model, predictors, ids).item()
    predictors.step(0.0)
    last_hidden(model, ids, None)
    lessons = [layer.lesson for layer in predictors.layers]
    penalty = predictors.penalty(1.0, {})
    assert penalty.item() != expected  # for the step moved the thresholds
    penalty.backward()
    gradient = ffns(model)[-1].gate_proj.weight.grad.clone()
    model.zero_grad()
    for block in model.model.layers:
        block.compile(backend="aot_eager")
    last_hidden(model, ids, None)
    for mine, theirs in zip(lessons, [layer.lesson for layer in predictors.layers], strict=True):
        torch.testing.assert_close(mine, theirs)
    compiled = predictors.penalty(1.0, {})
    assert compiled.item() == pytest.approx(penalty.item(), rel=1e-5)
    compiled.backward()
    torch.testing.assert_close(ffns(model)[-1].gate_proj.weight.grad, gradient)
    predictors.step(0.0)
    assert _penalty(model, predictors, ids).item() != pytest.approx(penalty.item(), rel=1e-6)


def test_a_dense_model_has_nothing_to_predict(folder):
    dense = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32)
    with pytest.raises(UserError, match="predictability"):
        Predictors(dense, Predictability())


def test_the_rank_that_takes_a_share_of_the_weights():
    assert rank_for(0.1, 576, 1536) == 125
    assert rank_for(0.1, 576, 1536, 2) == 104
    assert rank_for(0.1, 576, 1536, 2, 2) == 83
    assert rank_for(0.001, 8, 8) == 1
