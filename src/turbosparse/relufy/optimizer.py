"""AdamW with a learning rate of their own for the feed-forward blocks, which have the most to learn anew."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from turbosparse.relufy.recipes import Stage


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
