"""Our engine as a contestant that decodes several sequences together."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from turbosparse.bench.compare import Run, Sample
from turbosparse.engine import Engine, SamplingParams


class EngineBatch:
    """A mode of a loaded model over `sequences` sequences. Each reads the prompt with other tokens, so they differ.

    Its tokens are those of all sequences together, and so are its speeds.
    """

    def __init__(self, engine: Engine, mode: str, sequences: int) -> None:
        self._engine, self._mode, self.sequences = engine, mode, sequences

    @property
    def mode(self) -> str:
        return self._mode

    def measure(self, prompt: Sequence[int], decode_tokens: int) -> Sample:
        engine, greedy = self._engine, SamplingParams()
        sessions = [engine.session(len(prompt) + decode_tokens) for _ in range(self.sequences)]
        started = time.perf_counter()
        for index, session in enumerate(sessions):
            session.prefill([(token + index) % engine.config.vocab_size for token in prompt], self._mode)
        read = time.perf_counter()
        engine.traffic(reset=True)
        begun = time.perf_counter()
        for _ in range(decode_tokens):
            engine.decode_batch(sessions, [session.sample(greedy) for session in sessions], self._mode)
        done = time.perf_counter()
        traffic = engine.traffic(reset=True)
        prompt_tokens, tokens = self.sequences * len(prompt), self.sequences * decode_tokens
        return Sample(
            prompt_tokens, read - started, tokens, done - begun, traffic.bytes, traffic.sparsity, traffic.selected
        )


@dataclass(frozen=True)
class Throughput:
    """Speed of a mode over several sequences, in tokens/s of all together; `bytes_per_step` of weights for one each."""

    mode: str
    sequences: int
    decode_tok_s: float
    bytes_per_step: float | None
    gb_s: float | None


def throughput(run: Run, sequences: int) -> Throughput:
    """What the medians of an `EngineBatch` say."""
    per_step = None if run.bytes_per_token is None else run.bytes_per_token * sequences
    return Throughput(run.mode, sequences, run.decode_tok_s, per_step, run.gb_s)
