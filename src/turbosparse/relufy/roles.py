"""Call that projection of a dReLU neuron its gate which is positive less often.

relu(a) * relu(b) does not mind which factor is the gate, but the engine does: in exact mode it reads all gates, and of
up only the rows whose gate is open. So the rows of the two trade places where up is the one that closes more often.
The model computes the same. A gate that serves several neurons stays what it is.

Shapes: B windows, T tokens, F neurons of one FFN.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from turbosparse.relufy.objective import ffns
from turbosparse.relufy.observe import observe


class _Openings:
    """Tap that counts how often gates and ups are positive."""

    def __init__(self) -> None:
        self.gate_F: Tensor | int = 0
        self.up_F: Tensor | int = 0

    def __call__(self, gate_BTF: Tensor, up_BTF: Tensor, h_BTF: Tensor) -> None:
        self.gate_F = self.gate_F + (gate_BTF > 0).sum((0, 1))
        self.up_F = self.up_F + (up_BTF > 0).sum((0, 1))


@torch.no_grad()
def settle_roles(model: Any, batches: Iterable[Tensor], dtype: torch.dtype | None = None) -> float:
    """Let gate and up of a dReLU model trade places, in place, where up is positive less often.

    Args:
        model: a dReLU model whose neurons have gates of their own; of any other nothing is changed.
        batches: int64 [B, T] token ids; some ten thousand tokens are enough.
        dtype: of the residual stream, as in last_hidden.

    Returns:
        the share of neurons whose projections traded places, 0..1.
    """
    mlps = ffns(model)
    if any(getattr(mlp, "activation", None) != "drelu" or mlp.neurons_per_gate > 1 for mlp in mlps):
        return 0.0
    taps = [_Openings() for _ in mlps]
    observe(model, taps, batches, dtype)
    shares = []
    for mlp, openings in zip(mlps, taps, strict=True):
        trade_F = torch.as_tensor(openings.up_F) < torch.as_tensor(openings.gate_F)
        for name in ("weight", "bias"):
            gate, up = getattr(mlp.gate_proj, name), getattr(mlp.up_proj, name)
            if gate is not None:
                rows = gate[trade_F].clone()
                gate[trade_F] = up[trade_F]
                up[trade_F] = rows
        shares.append(trade_F.float().mean())
    return torch.stack(shares).mean().item()
