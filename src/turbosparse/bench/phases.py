"""Where a token's time goes: the engine's own timers, against how fast its threads can read at that moment.

Memory may be shared with other machines and change its speed within minutes. So before and after every few tokens the
threads that decode read all weights fetched ahead, and a share of the limit compares neighbours. Weights that stay
in a cache from token to token are read from there, and so is their limit.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from turbosparse.engine import Engine, PhaseTime, SamplingParams

TURN_TOKENS = 4
"""Decoded between two readings of the limit; they follow the prompt."""

WHOLE, BETWEEN = "whole pass", "between passes"

_LIMIT_SECONDS = 0.02


@dataclass(frozen=True)
class Phase:
    """Medians of a phase over the turns; milliseconds and bytes are those of a token.

    `waiting_ms` is the part of `ms` in which threads waited for each other. `gb_s` in 10^9 bytes/s and `of_limit` (a
    share: 1 is all that the threads can read) are None for what reads nothing. The whole pass is a row too, and so is
    what lies between two of them: sampling and Python.
    """

    mode: str
    phase: str
    ms: float
    waiting_ms: float
    bytes: float
    gb_s: float | None
    of_limit: float | None


@dataclass(frozen=True)
class _Turn:
    phases: dict[str, PhaseTime]  # of all tokens
    limit: float  # 10^9 bytes/s


class PhaseTimer:
    """A mode of a loaded model, timed a few tokens at a time."""

    def __init__(self, engine: Engine, mode: str, prompt: Sequence[int], name: str | None = None) -> None:
        self._engine, self._mode, self.name = engine, mode, name or mode
        self._session = engine.session(len(prompt) + TURN_TOKENS)
        self._session.prefill(prompt, mode)
        self._prompt, self._turns = prompt, list[_Turn]()

    def turn(self) -> None:
        """Read the limit, decode the tokens behind the prompt, read the limit again."""
        before = self._limit()
        phases = self._decode()
        self._turns.append(_Turn(phases, (before + self._limit()) / 2))

    def _limit(self) -> float:
        rates = list[float]()
        end = time.perf_counter() + _LIMIT_SECONDS
        while not rates or time.perf_counter() < end:
            rates.append(self._engine.read_rate())
        return statistics.median(rates)

    def _decode(self) -> dict[str, PhaseTime]:
        engine, session, (*before, token) = self._engine, self._session, self._prompt
        kept = session.truncate(len(before))
        if kept < len(before):  # a layer that slides has forgotten what they would see
            session.prefill(before[kept:], self._mode)
        engine.time_phases()
        engine.phases(reset=True)
        begun = time.perf_counter()
        for _ in range(TURN_TOKENS):
            token = session.draw(token, SamplingParams(), self._mode)
        seconds = time.perf_counter() - begun
        engine.time_phases(False)
        phases = engine.phases()
        every = phases.values()
        whole = PhaseTime(sum(p.seconds for p in every), sum(p.waited for p in every), sum(p.bytes for p in every))
        return phases | {WHOLE: whole, BETWEEN: PhaseTime(seconds - whole.seconds, 0.0, 0)}

    @property
    def limit(self) -> float:
        """Median of the read limit over the turns, in 10^9 bytes/s."""
        return statistics.median(turn.limit for turn in self._turns)

    def summary(self) -> list[Phase]:
        """The phases that took any time, in the order of the pass, then the whole pass and what lies between."""
        return [self._phase(name) for name in self._turns[0].phases if any(t.phases[name].seconds for t in self._turns)]

    def _phase(self, name: str) -> Phase:
        times = [turn.phases[name] for turn in self._turns]
        gb_s = share = None
        if all(each.bytes and each.seconds for each in times):
            rates = [each.bytes / each.seconds / 1e9 for each in times]
            gb_s = statistics.median(rates)
            share = statistics.median(rate / turn.limit for rate, turn in zip(rates, self._turns, strict=True))
        ms, waiting, read = (
            statistics.median(figures) / TURN_TOKENS
            for figures in ([t.seconds * 1e3 for t in times], [t.waited * 1e3 for t in times], [t.bytes for t in times])
        )
        return Phase(self.name, name, ms, waiting, read, gb_s, share)


def time_phases(
    timers: Sequence[PhaseTimer], turns: int, progress: Callable[[int, int], None] | None = None
) -> list[Phase]:
    """Let all timers take `turns` turns, interleaved; the phases of each.

    Args:
        timers: of any engines.
        turns: at least one.
        progress: called with (turns done, turns in all).
    """
    total = turns * len(timers)
    for index in range(total):
        timers[index % len(timers)].turn()
        if progress is not None:
            progress(index + 1, total)
    return [phase for timer in timers for phase in timer.summary()]
