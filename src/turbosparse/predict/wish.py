"""What is asked of train-predictors."""

from __future__ import annotations

from dataclasses import dataclass

from turbosparse.errors import UserError
from turbosparse.predict.ranks import BLOCK


@dataclass(frozen=True)
class Wish:
    """What is asked for.

    Attributes:
        share: bytes of all predictors over those of the dense FFNs; not looked at where there is a `rank`.
        rank: rows of every layer's fc1.
        recall: share of the |h| mass that thresholds keep, on average over the layers.
        tokens: to read at most.
        epochs: how often the tokens are gone through when a layer is fitted.
        device: "cpu", "cuda", or "auto" for CUDA where there is some.
        keep: the model's predictors stay as they are but for the neurons that are always selected (sinks.py), and
            their thresholds are set anew.
        together: hold the model in memory and fit all layers at once (together.py); for GPUs.
        gates: nothing is trained, the gates themselves are the scores (gates.py); None: where they are ternary and
            nothing else is said of how to train.
        end_to_end: steps of training all predictors on the model's own output afterwards (end_to_end.py).
    """

    share: float = 0.10
    rank: int | None = None
    recall: float = 0.98
    tokens: int = 100_000
    epochs: float = 15.0
    device: str = "auto"
    keep: bool = False
    together: bool = False
    end_to_end: int = 0
    gates: bool | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and (self.rank < BLOCK or self.rank % BLOCK):
            raise UserError(f"--rank {self.rank}: it must be a multiple of {BLOCK}, as weights are stored in blocks.")
        if not 0.0 < self.share <= 1.0:
            raise UserError(f"--share {self.share:g}: it must be over 0 and at most 1.")
        if self.keep and (self.together or self.end_to_end):
            raise UserError("--keep trains nothing; leave it out, or leave --together and --end-to-end out.")
        if self.gates and self.trains_by_choice:
            raise UserError(
                "--gates trains nothing; leave it out, or leave --rank, --keep, --together and --end-to-end out."
            )
        if not 0.0 < self.recall <= 1.0:
            raise UserError(f"--recall {self.recall:g}: it must be over 0 and at most 1.")

    @property
    def trains_by_choice(self) -> bool:
        """Whether something was said of how predictors come about."""
        return self.rank is not None or self.keep or self.together or self.end_to_end > 0
