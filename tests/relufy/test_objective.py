"""What a stage minimises where its teacher knows only some of the text."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import turbosparse  # noqa: F401  registers the sparse model types
from turbosparse.relufy.objective import NextToken
from turbosparse.relufy.recipes import Pressure, Sparsity


@pytest.fixture(scope="module")
def models(folder):
    return [AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32) for name in ("drelu", "dense")]


def _loss(models, shares, domains) -> float:
    student, teacher = models
    ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "domain": torch.tensor(domains)}
    return NextToken(student, None, teacher, None if shares is None else torch.tensor(shares))(
        student, batch, 0.5
    ).total.item()


def test_text_that_the_teacher_does_not_know_counts_alone(models):
    plain, taught = _loss(models, None, [0, 1]), _loss(models, [1.0, 1.0], [0, 1])
    assert plain != pytest.approx(taught, rel=1e-4)
    assert _loss(models, [0.0, 0.0], [0, 1]) == pytest.approx(plain, rel=1e-6)
    assert _loss(models, [1.0, 0.0], [1, 1]) == pytest.approx(plain, rel=1e-6)
    assert _loss(models, [1.0, 0.0], [0, 0]) == pytest.approx(taught, rel=1e-6)
    # Of two windows the one that is taught keeps the teacher's part of the loss, the other the text's.
    halves = _loss(models, [1.0, 0.0], [0, 1]) + _loss(models, [0.0, 1.0], [0, 1])
    assert halves == pytest.approx(plain + taught, rel=1e-5)


def test_idle_gates_cost_what_they_are_over_their_target(models):
    student, ids = models[0], torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "domain": torch.tensor([0, 0])}

    def loss(target: float | None):
        idle = None if target is None else Pressure(target_rate=target, start_rate=target, weight=3.0, width=0.05)
        quiet = Sparsity(target_rate=0.999, start_rate=1.0, idle=idle)  # asks for nothing itself
        return NextToken(student, quiet)(student, batch, 0.5)

    plain = loss(None)
    idle_rate = (plain.metrics["sparsity_h"] - plain.metrics["sparsity_gate"]).item()
    assert idle_rate > 0.1
    assert loss(idle_rate + 0.01).total.item() == pytest.approx(plain.total.item())
    half, full = loss(idle_rate - 0.025).total - plain.total, loss(idle_rate - 0.05).total - plain.total
    assert half.item() == pytest.approx(full.item() / 2, rel=0.01)
    soft = torch.stack([layer.mlp.tap.soft_idle for layer in student.model.layers]).mean()
    assert full.item() == pytest.approx(3.0 * soft.item(), rel=0.01)
