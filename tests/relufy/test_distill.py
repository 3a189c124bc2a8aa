import pytest
import torch
from torch.nn import functional as F

from turbosparse.relufy import distill
from turbosparse.relufy.distill import Teacher, mixed_cross_entropy, token_cross_entropy


@pytest.fixture
def tensors(monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    monkeypatch.setattr(distill, "_CHUNK", 5)  # 13 tokens make two full chunks and a ragged one
    torch.manual_seed(0)
    hidden, weight = torch.randn(13, 8), torch.randn(17, 8)
    return hidden, weight, torch.randint(17, (13,)), torch.randn(13, 6)


def _reference(hidden, weight, labels, softcap, teacher_probabilities, share):
    logits = hidden @ weight.T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    target = (1 - share) * F.one_hot(labels, weight.shape[0]) + share * teacher_probabilities
    return -(target * F.log_softmax(logits, -1)).sum(-1).mean()


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_loss_and_gradients_equal_the_unchunked_formula(tensors, softcap, share):
    hidden, weight, labels, teacher_hidden = tensors
    teacher_weight = torch.randn(17, 6)
    probabilities = F.softmax(teacher_hidden @ teacher_weight.T, -1)
    expected_inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    expected = _reference(*expected_inputs, labels, softcap, probabilities, share)
    (2 * expected).backward()

    inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    teacher = Teacher(teacher_hidden, teacher_weight, None) if share else None
    loss, ce = mixed_cross_entropy(*inputs, labels, softcap, teacher, share)
    (2 * loss).backward()

    torch.testing.assert_close(loss, expected + 0 * loss, rtol=1e-5, atol=1e-6)
    for tensor, reference in zip(inputs, expected_inputs, strict=True):
        torch.testing.assert_close(tensor.grad, reference.grad, rtol=1e-4, atol=1e-6)
    plain = _reference(hidden, weight, labels, softcap, 0, 0.0)
    torch.testing.assert_close(ce.mean(), plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(token_cross_entropy(hidden, weight, labels, softcap), ce)


def test_each_token_has_a_share_of_its_own(tensors):
    hidden, weight, labels, teacher_hidden = tensors
    teacher_weight, share = torch.randn(17, 6), torch.linspace(0, 1, 13)
    probabilities = F.softmax(teacher_hidden @ teacher_weight.T, -1)
    expected_inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    _reference(*expected_inputs, labels, None, probabilities, share[:, None]).backward()

    inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    mixed_cross_entropy(*inputs, labels, None, Teacher(teacher_hidden, teacher_weight, None), share)[0].backward()
    for tensor, reference in zip(inputs, expected_inputs, strict=True):
        torch.testing.assert_close(tensor.grad, reference.grad, rtol=1e-4, atol=1e-6)
