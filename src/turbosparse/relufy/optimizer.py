"""The optimizers of recovery training: AdamW, or Muon for the matrices of the blocks with AdamW for all the rest.

Muon replaces the momentum of a matrix by the nearest orthogonal matrix, so that every direction of it moves alike
(Keller Jordan 2024, kellerjordan.github.io/posts/muon). Scaled as AdamW's updates are (Moonlight, arXiv 2502.16982),
it takes the learning rates that AdamW takes. torch.optim.Muon works through the matrices one by one; here those of one
shape, that is all layers, go through the iteration together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from turbosparse.relufy.recipes import Stage

_MOMENTUM = 0.95
# x -> a x + b x^3 + c x^5 moves singular values in (0, 1] close to 1 in five rounds (Jordan's coefficients).
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5
_RMS = 0.2  # of an AdamW update, in units of the learning rate


def orthogonalized(matrices_LMN: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix of each of L matrices, roughly: singular values end within 0.7 to 1.2."""
    wide = matrices_LMN.shape[-2] <= matrices_LMN.shape[-1]
    x = matrices_LMN if wide else matrices_LMN.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    a, b, c = _QUINTIC
    for _ in range(_ROUNDS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Muon on `matrices` (2-D each), AdamW on `others`, with one learning rate and one weight decay.

    Args:
        betas: of AdamW.
        dtype: of the orthogonalisation; bfloat16 on a GPU, float32 where there is none.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        others: Iterable[Tensor],
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        dtype: torch.dtype,
    ) -> None:
        groups = [{"params": list(matrices), "muon": True}, {"params": list(others), "muon": False}]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "betas": betas})
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            (self._muon if group["muon"] else self._adamw)(group, params)

    def _muon(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        grads = [p.grad for p in params if p.grad is not None]
        momenta = [self.state[p]["momentum"] for p in params]
        torch._foreach_lerp_(momenta, grads, 1 - _MOMENTUM)
        updates = torch._foreach_lerp(grads, momenta, _MOMENTUM)  # Nesterov's look ahead
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        of_shape: dict[torch.Size, list[int]] = defaultdict(list)
        for i, p in enumerate(params):
            of_shape[p.shape].append(i)
        for shape, indices in of_shape.items():
            turned = orthogonalized(torch.stack([updates[i] for i in indices]).to(self._dtype)).float()
            step = -group["lr"] * _RMS * max(shape) ** 0.5
            torch._foreach_add_([params[i] for i in indices], list(turned.unbind()), alpha=step)

    def _adamw(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for p in params:
            if not self.state[p]:
                zeros = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
                self.state[p] = zeros | {"step": torch.zeros((), device=p.device)}
        states = [self.state[p] for p in params]
        adamw(
            params,
            [p.grad for p in params if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=params[0].is_cuda if params else False,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=1e-8,
            maximize=False,
        )


def make_muon(model: Any, stage: Stage) -> Muon:
    """Muon for the matrices of the blocks; embeddings, output matrix, norms and biases stay with AdamW."""
    trained = [p for p in model.parameters() if p.requires_grad]
    blocks: nn.Module = model.model.layers
    matrices = [p for p in blocks.parameters() if p.requires_grad and p.ndim == 2]
    chosen = {id(p) for p in matrices}
    dtype = torch.bfloat16 if trained[0].is_cuda else torch.float32
    others = [p for p in trained if id(p) not in chosen]
    return Muon(matrices, others, stage.learning_rate, stage.weight_decay, stage.betas, dtype)


def make_adamw(model: Any, stage: Stage) -> torch.optim.AdamW:
    """AdamW whose FFNs learn `stage.ffn_lr` times as fast as the rest; only matrices decay."""
    inside = {id(p) for layer in model.model.layers for p in layer.mlp.parameters()}
    groups: dict[tuple[bool, bool], list[Tensor]] = defaultdict(list)
    for p in model.parameters():
        if p.requires_grad:
            groups[id(p) in inside, p.ndim > 1].append(p)
    settings = [
        {
            "params": params,
            "lr": stage.learning_rate * (stage.ffn_lr if in_ffn else 1),
            "weight_decay": stage.weight_decay if decays else 0.0,
        }
        for (in_ffn, decays), params in groups.items()
    ]
    return torch.optim.AdamW(settings, betas=stage.betas, fused=next(model.parameters()).is_cuda)
