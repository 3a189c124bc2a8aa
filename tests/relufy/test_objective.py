"""What a stage minimises where its teacher knows only some of the text."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import turbosparse  # noqa: F401  registers the sparse model types
from turbosparse.relufy.objective import NextToken


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
