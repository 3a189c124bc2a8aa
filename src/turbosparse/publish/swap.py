"""Which activation a model was given in place of its own, as a card describes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from turbosparse.errors import UserError
from turbosparse.model.checkpoint import read_config


@dataclass(frozen=True)
class Swap:
    """An activation of ours: `tag` on the hub, its name, what it computes, and where it is proposed."""

    tag: str
    name: str
    formula: str
    paper: str


_SWAPS = (
    Swap("drelu", "dReLU", "relu(gate) * relu(up)", "https://arxiv.org/abs/2406.05955"),
    Swap("reglu", "ReGLU", "relu(gate) * up", "https://arxiv.org/abs/2002.05202"),
)


def read_swap(folder: Path) -> Swap | None:
    """The swap that the config.json of a model folder names; None for a dense model, which kept its activation.

    Raises:
        UserError: the config cannot be read, or names something else.
    """
    activation = read_config(folder).get("activation")
    if activation is None:
        return None
    for swap in _SWAPS:
        if swap.tag == activation:
            return swap
    raise UserError(f"{folder}: `activation` in its config.json is neither drelu nor reglu; put back the run's own.")
