"""What mode lossless did: how much it drafted, and how much of that came true."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any


@dataclass(frozen=True)
class Drafting:
    """Counts of a session in mode lossless.

    Attributes:
        verifications: exact passes.
        tokens: that came of them, one each and the drafts that came true.
        looked_up, looked_up_right: drafts from what followed the last time that the text ended so, and those of them
            that came true.
        predicted, predicted_right: drafts decoded in predicted mode.
    """

    verifications: int
    tokens: int
    looked_up: int
    looked_up_right: int
    predicted: int
    predicted_right: int

    def __add__(self, other: Drafting) -> Drafting:
        return Drafting(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def to_json(self) -> dict[str, Any]:
        """The counts, and what they come to; None where there was nothing."""
        drafts, right = self.looked_up + self.predicted, self.looked_up_right + self.predicted_right
        return vars(self) | {
            "acceptance": right / drafts if drafts else None,
            "tokens_per_verification": self.tokens / self.verifications if self.verifications else None,
        }
