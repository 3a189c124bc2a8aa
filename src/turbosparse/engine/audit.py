"""What the audit of predicted mode found (csrc/audit.h), with confidence intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Estimate:
    """A mean over audited tokens and its 95 % confidence interval; None where there are too few tokens.

    NaN where a token's value is no number, as damaged weights make it.
    """

    mean: float | None
    low: float | None
    high: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """From one value a token, with Student's distribution."""
        if not values:
            return cls(None, None, None)
        if not all(map(math.isfinite, values)):
            return cls(math.nan, math.nan, math.nan)
        mean = statistics.fmean(values)
        if len(values) < 2:
            return cls(mean, None, None)
        half = _student(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
        return cls(mean, mean - half, mean + half)


def _student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t distribution (Abramowitz and Stegun 26.7.5; the first three tabulated)."""
    if freedom <= 3:
        return (12.706, 4.303, 3.182)[freedom - 1]
    z = float(statistics.NormalDist().inv_cdf(0.975))
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + math.fsum(term / freedom**power for power, term in enumerate(terms, 1))


@dataclass(frozen=True)
class LayerAudit:
    """One layer over all audited tokens: shares 0..1 of the neurons that fire and of the sum of |h| that are selected.

    Both are None where nothing was predicted or nothing fired.
    """

    layer: int
    recall: float | None
    kept: float | None


@dataclass(frozen=True)
class Move:
    """A layer's thresholds were moved: at a position, for the `kept` of |h| since the last move, by a difference."""

    position: int
    layer: int
    kept: float
    by: float


@dataclass(frozen=True)
class AuditReport:
    """What the audited tokens of a session say of its predictors.

    Attributes:
        share: of the tokens that are audited, 0..1.
        promised: share of |h| that the file promises to keep in each layer, 0 where it promises nothing for one; None
            where it promises nothing at all.
        verdicts: (position, recall, kept, kl) of every audited token: the share of its firing neurons that are
            selected, that of the sum of |h| that these hold, and KL(exact || predicted) of the next token's
            probabilities in nats, with the same keys and values before it.
        sums: (neurons that fired, that were selected too, their |h|, of the selected) of every layer.
        moves: of thresholds, in their order.
    """

    share: float
    promised: tuple[float, ...] | None
    verdicts: tuple[tuple[int, float, float, float], ...]
    sums: tuple[tuple[int, int, float, float], ...]
    moves: tuple[Move, ...]

    def __add__(self, other: AuditReport) -> AuditReport:
        """Both sessions together."""
        sums = tuple(
            (a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]) for a, b in zip(self.sums, other.sums, strict=True)
        )
        return replace(self, verdicts=self.verdicts + other.verdicts, sums=sums, moves=self.moves + other.moves)

    @property
    def recall(self) -> Estimate:
        return Estimate.of([verdict[1] for verdict in self.verdicts])

    @property
    def kept(self) -> Estimate:
        return Estimate.of([verdict[2] for verdict in self.verdicts])

    @property
    def kl(self) -> Estimate:
        return Estimate.of([verdict[3] for verdict in self.verdicts])

    @property
    def layers(self) -> tuple[LayerAudit, ...]:
        return tuple(
            LayerAudit(index, hit / fired if fired else None, held / mass if mass else None)
            for index, (fired, hit, mass, held) in enumerate(self.sums)
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "share": self.share,
            "promised": None if self.promised is None else list(self.promised),
            "tokens": len(self.verdicts),
            **{name: vars(getattr(self, name)) for name in ("recall", "kept", "kl")},
            **{name: [vars(each) for each in getattr(self, name)] for name in ("layers", "moves")},
        }
