"""Our engine as a contestant: one mode of one file."""

from __future__ import annotations

import time
from collections.abc import Sequence

from turbosparse.bench.compare import Sample
from turbosparse.engine import Engine, SamplingParams


class EngineMode:
    """A mode of a loaded model. Decoding is greedy from the logits, so every pass of a mode reads the same tokens."""

    def __init__(self, engine: Engine, mode: str, name: str | None = None) -> None:
        self._engine, self._mode, self._name = engine, mode, name or mode

    @property
    def mode(self) -> str:
        return self._name

    def measure(self, prompt: Sequence[int], decode_tokens: int) -> Sample:
        session = self._engine.session(len(prompt) + decode_tokens)
        greedy = SamplingParams()
        started = time.perf_counter()
        session.prefill(prompt, self._mode)
        read = time.perf_counter()
        self._engine.traffic(reset=True)
        begun = time.perf_counter()
        for _ in range(decode_tokens):
            session.decode(session.sample(greedy), self._mode)
        done = time.perf_counter()
        traffic = self._engine.traffic(reset=True)
        return Sample(
            len(prompt), read - started, decode_tokens, done - begun, traffic.bytes, traffic.sparsity, traffic.selected
        )
