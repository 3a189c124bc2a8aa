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
    share_N: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over tokens of the mixed cross-entropy, the plain one of each, and the gradient of the products [N, V].

    The loss is H(q, p) for q = share * teacher + (1 - share) * one-hot; the entropy of q is constant, so this is the
    KL divergence up to a constant. Its gradient p - q is written down instead of left to autograd, which would walk
    over all logits several times more.
    """
    logits_NV = _logits(hidden_ND, weight_VD, softcap)
    log_norm_N = torch.logsumexp(logits_NV, dim=-1)
    is_label_NV = torch.arange(weight_VD.shape[0], device=labels_N.device) == labels_N[:, None]
    ce_N = log_norm_N - logits_NV.gather(-1, labels_N[:, None])[:, 0]
    loss_N = ce_N
    grad_NV = torch.exp(logits_NV - log_norm_N[:, None])
    if teacher is None:
        grad_NV = grad_NV - is_label_NV.float()
    else:
        teacher_NV = F.softmax(_logits(*teacher), dim=-1)
        loss_N = share_N * (log_norm_N - (teacher_NV * logits_NV).sum(-1)) + (1 - share_N) * ce_N
        grad_NV = grad_NV - share_N[:, None] * teacher_NV - (1 - share_N)[:, None] * is_label_NV.float()
    if softcap:
        grad_NV = grad_NV * (1 - (logits_NV / softcap).square())
    return loss_N.sum(), ce_N, grad_NV.to(hidden_ND.dtype)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        softcap: float | None,
        teacher: Teacher | None,
        share_N: Tensor,
        chunk_loss: Callable[..., tuple[Tensor, Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        n = labels_N.numel()
        compute = weight_VD.detach().to(hidden_ND.dtype)
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        ce_N = torch.empty(n, dtype=torch.float32, device=hidden_ND.device)
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        for start in range(0, n, _CHUNK):
            rows = slice(start, start + _CHUNK)
            chunk = hidden_ND[rows].detach()
            chunk_teacher = teacher and teacher._replace(hidden_ND=teacher.hidden_ND[rows])
            loss, ce_N[rows], grad_NV = chunk_loss(
                chunk, compute, labels_N[rows], softcap, chunk_teacher, share_N[rows]
            )
            grad_hidden_ND[rows] = grad_NV @ compute
            grad_weight_VD += grad_NV.T @ chunk
            total += loss
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
    share: float | Tensor = 0.0,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mean over tokens of the cross-entropy against `share` * teacher + (1 - share) * text.

    Args:
        hidden_ND: last hidden states; their dtype is that of the matrix products.
        weight_VD: output matrix, usually the fp32 master weights; its gradient comes back in its own dtype.
        labels_N: int64 ids of the tokens that follow.
        softcap: final logit softcap of Gemma 2, or None.
        share: 0..1, of all tokens or of each, float32 [N].
        compiled: run each chunk through torch.compile.

    Returns:
        the loss, a float32 scalar, and the plain cross-entropy of every token, float32 [N], without gradient.
    """
    chunk_loss = _compiled_chunk_loss() if compiled else _chunk_loss
    share_N = share if isinstance(share, Tensor) else torch.full(labels_N.shape, share, device=labels_N.device)
    return _ChunkedLoss.apply(hidden_ND, weight_VD, labels_N, softcap, teacher, share_N, chunk_loss)


def token_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, softcap: float | None = None) -> Tensor:
    """Cross-entropy of every token, float32 [N], nats, without gradient; logits live one chunk at a time."""
    weight_VD = weight_VD.to(hidden_ND.dtype)
    with torch.no_grad():
        chunks = [
            F.cross_entropy(_logits(hidden, weight_VD, softcap), labels, reduction="none")
            for hidden, labels in zip(hidden_ND.split(_CHUNK), labels_N.split(_CHUNK), strict=True)
        ]
    return torch.cat(chunks)


_COMPILED: list[Callable[..., tuple[Tensor, Tensor, Tensor]]] = []


def _compiled_chunk_loss() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    if not _COMPILED:
        _COMPILED.append(torch.compile(_chunk_loss, dynamic=False))
    return _COMPILED[0]
