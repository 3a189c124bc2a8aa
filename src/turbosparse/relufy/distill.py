"""Cross-entropy against a mixture of the text and a teacher, without ever holding all logits.

Shapes: N tokens, D hidden, V vocabulary. Logits of 65k tokens over 49k words would take 13 GB in fp32, so the loss is
computed in chunks whose gradients are taken at once and kept instead of the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_CHUNK = 8192  # tokens: 0.8 GB of bf16 logits at a vocabulary of 49k


class Teacher(NamedTuple):
    """What the loss needs of a teacher: its last hidden states [N, D'], its output matrix [V, D'], its softcap."""

    hidden_ND: Tensor
    weight_VD: Tensor
    softcap: float | None


def _logits(hidden_ND: Tensor, weight_VD: Tensor, softcap: float | None) -> Tensor:
    logits = (hidden_ND @ weight_VD.T).float()
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def _chunk_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    softcap: float | None,
    teacher: Teacher | None,
    share: float,
) -> tuple[Tensor, Tensor]:
    """Sum over tokens of the mixed cross-entropy, and the plain cross-entropy of every token."""
    logits_NV = _logits(hidden_ND, weight_VD, softcap)
    log_norm_N = torch.logsumexp(logits_NV, dim=-1)
    ce_N = log_norm_N - logits_NV.gather(-1, labels_N[:, None])[:, 0]
    if teacher is None:
        return ce_N.sum(), ce_N.detach()
    # H(q, p) for q = share * teacher + (1 - share) * one-hot: the entropy of q is constant, so this is KL up to a
    # constant.
    teacher_NV = _logits(*teacher)
    expected_N = (F.softmax(teacher_NV, dim=-1) * logits_NV).sum(-1)
    return (share * (log_norm_N - expected_N) + (1 - share) * ce_N).sum(), ce_N.detach()


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        softcap: float | None,
        teacher: Teacher | None,
        share: float,
        chunk_loss: Callable[..., tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        n = labels_N.numel()
        compute = weight_VD.detach().to(hidden_ND.dtype).requires_grad_()
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        ce_N = torch.empty(n, dtype=torch.float32, device=hidden_ND.device)
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        for start in range(0, n, _CHUNK):
            rows = slice(start, start + _CHUNK)
            chunk = hidden_ND[rows].detach().requires_grad_()
            chunk_teacher = teacher and teacher._replace(hidden_ND=teacher.hidden_ND[rows])
            with torch.enable_grad():
                loss, ce_N[rows] = chunk_loss(chunk, compute, labels_N[rows], softcap, chunk_teacher, share)
            grad_hidden_ND[rows], grad_weight = torch.autograd.grad(loss, (chunk, compute))
            grad_weight_VD += grad_weight
            total += loss.detach()
        ctx.save_for_backward(grad_hidden_ND / n, (grad_weight_VD / n).to(weight_VD.dtype))
        ctx.mark_non_differentiable(ce_N)
        return total / n, ce_N

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_ND, grad_weight_VD = ctx.saved_tensors
        return grad_hidden_ND * grad_loss, grad_weight_VD * grad_loss, None, None, None, None, None


def mixed_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    softcap: float | None = None,
    teacher: Teacher | None = None,
    share: float = 0.0,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mean over tokens of the cross-entropy against `share` * teacher + (1 - share) * text.

    Args:
        hidden_ND: last hidden states; their dtype is that of the matrix products.
        weight_VD: output matrix, usually the fp32 master weights; its gradient comes back in its own dtype.
        labels_N: int64 ids of the tokens that follow.
        softcap: final logit softcap of Gemma 2, or None.
        compiled: run each chunk through torch.compile.

    Returns:
        the loss, a float32 scalar, and the plain cross-entropy of every token, float32 [N], without gradient.
    """
    chunk_loss = _compiled_chunk_loss() if compiled else _chunk_loss
    return _ChunkedLoss.apply(hidden_ND, weight_VD, labels_N, softcap, teacher, share, chunk_loss)


def token_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, softcap: float | None = None) -> Tensor:
    """Cross-entropy of every token, float32 [N], nats, without gradient; logits live one chunk at a time."""
    weight_VD = weight_VD.to(hidden_ND.dtype)
    with torch.no_grad():
        chunks = [
            F.cross_entropy(_logits(hidden, weight_VD, softcap), labels, reduction="none")
            for hidden, labels in zip(hidden_ND.split(_CHUNK), labels_N.split(_CHUNK), strict=True)
        ]
    return torch.cat(chunks)


_COMPILED: list[Callable[..., tuple[Tensor, Tensor]]] = []


def _compiled_chunk_loss() -> Callable[..., tuple[Tensor, Tensor]]:
    if not _COMPILED:
        _COMPILED.append(torch.compile(_chunk_loss, dynamic=False))
    return _COMPILED[0]
