"""Interleaved timing of several contestants on the same tokens.

Every round times every contestant once, so that a change of the machine's speed hits all of them; a figure is the
median over the rounds, after one round that is thrown away.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from turbosparse.engine import AuditReport, Drafting


@dataclass(frozen=True)
class Sample:
    """One timed pass: a prompt, then tokens decoded one by one. Times in seconds.

    `bytes_read` counts the weights read while decoding, `zeros` is the sparsity of h and `selected` the share of
    neurons that predictors selected while decoding (0..1); None where a contestant cannot tell or has no predictor.
    `drafting` is what mode lossless did, `audit` what predicted mode's audit found.
    """

    prompt_tokens: int
    prefill_seconds: float
    decode_tokens: int
    decode_seconds: float
    bytes_read: int | None = None
    zeros: float | None = None
    selected: float | None = None
    drafting: Drafting | None = None
    audit: AuditReport | None = None


class Contestant(Protocol):
    """Something that can be timed: a mode of our engine, a dense twin, a peer."""

    @property
    def mode(self) -> str:
        """The name of its row."""

    def measure(self, prompt: Sequence[int], decode_tokens: int) -> Sample:
        """Time one pass over `prompt`, and `decode_tokens` tokens after it."""


@dataclass(frozen=True)
class Run:
    """The medians of one contestant; speeds in tokens/s, `gb_s` in 10^9 bytes of weights per second of decoding.

    `lossless` is what that mode did in all passes, as `Drafting.to_json` has it; `audit` is that of predicted mode over
    all passes, as `AuditReport.to_json` has it. Both are None for other modes.
    """

    mode: str
    prefill_tok_s: float
    decode_tok_s: float
    bytes_per_token: float | None
    gb_s: float | None
    sparsity: float | None
    selected: float | None = None
    lossless: dict[str, Any] | None = None
    audit: dict[str, Any] | None = None


def summarize(mode: str, samples: Sequence[Sample]) -> Run:
    """Reduce the samples of one contestant to medians."""
    decode = statistics.median(sample.decode_tokens / sample.decode_seconds for sample in samples)
    read = [sample.bytes_read / sample.decode_tokens for sample in samples if sample.bytes_read is not None]
    zeros = [sample.zeros for sample in samples if sample.zeros is not None]
    selected = [sample.selected for sample in samples if sample.selected is not None]
    bytes_per_token = statistics.median(read) if read else None
    drafting = [sample.drafting for sample in samples if sample.drafting is not None]
    audits = [sample.audit for sample in samples if sample.audit is not None]
    return Run(
        mode=mode,
        prefill_tok_s=statistics.median(sample.prompt_tokens / sample.prefill_seconds for sample in samples),
        decode_tok_s=decode,
        bytes_per_token=bytes_per_token,
        gb_s=None if bytes_per_token is None else bytes_per_token * decode / 1e9,
        sparsity=statistics.median(zeros) if zeros else None,
        selected=statistics.median(selected) if selected else None,
        lossless=reduce(add, drafting).to_json() if drafting else None,
        audit=reduce(add, audits).to_json() if audits else None,
    )


def compare(
    contestants: Sequence[Contestant],
    prompt: Sequence[int],
    decode_tokens: int,
    repeats: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Run]:
    """Time all contestants `repeats` times, interleaved.

    Args:
        contestants: their order is the order within every round.
        prompt: token ids, at least one.
        decode_tokens: tokens decoded after the prompt in every pass, at least one.
        repeats: rounds that count; one more comes before them.
        progress: called with (passes done, passes in all).
    """
    samples: list[list[Sample]] = [[] for _ in contestants]
    total = (repeats + 1) * len(contestants)
    for pass_index in range(total):
        round_index, contestant_index = divmod(pass_index, len(contestants))
        sample = contestants[contestant_index].measure(prompt, decode_tokens)
        if round_index > 0:
            samples[contestant_index].append(sample)
        if progress is not None:
            progress(pass_index + 1, total)
    return [summarize(each.mode, taken) for each, taken in zip(contestants, samples, strict=True)]


def speedup(runs: Sequence[Run], mode: str, over: str = "dense") -> float | None:
    """Decode speed of `mode` over that of mode `over`; None where one of them was not run."""
    speeds = {run.mode: run.decode_tok_s for run in runs}
    return speeds[mode] / speeds[over] if mode in speeds and over in speeds else None
