"""How the next token is drawn; the drawing itself is native (csrc/sampler.cpp)."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import numpy as np
import numpy.typing as npt

from turbosparse import _native
from turbosparse.errors import UserError


@dataclass(frozen=True)
class SamplingParams:
    """Settings of the sampler; filters act in the order of the fields.

    Attributes:
        temperature: 0 takes the likeliest token, the lowest id among equals.
        top_k: keep the k likeliest; 0 keeps all.
        top_p: keep the likeliest until their probability reaches this.
        min_p: drop what is less likely than this share of the likeliest.
        repetition_penalty: divides positive and multiplies negative logits of tokens in the context (arXiv 1909.05858).
        seed: with the position, all that a draw depends on: same seed, same text.

    Raises:
        UserError: a value is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, ok, rule in (
            ("temperature", 0 <= self.temperature < float("inf"), "at least 0"),
            ("top_k", 0 <= self.top_k < 1 << 31, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "over 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "over 0"),
            ("seed", 0 <= self.seed < 1 << 64, "from 0 to 2^64 - 1"),
        ):
            if not ok:
                raise UserError(f"{name} is {getattr(self, name)}; it must be {rule}.")

    @property
    def values(self) -> tuple[float, int, float, float, float, int]:
        """All of them in their order, which is that of native calls."""
        return astuple(self)


def sample(logits: npt.NDArray[np.float32], params: SamplingParams, history: list[int], position: int) -> int:
    """Draw a token id from `logits` float32 [vocab], for the place `position` of a text whose tokens are `history`."""
    read = history if params.repetition_penalty != 1.0 else []
    return _native.sample(logits, read, position, *params.values)
