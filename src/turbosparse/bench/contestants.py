"""Our engine as a contestant: one mode of one file."""

from __future__ import annotations

import time
from collections.abc import Sequence

from turbosparse.bench.compare import Sample
from turbosparse.engine import LOSSLESS, Engine, SamplingParams, draw_tokens


class EngineMode:
    """A mode of a loaded model. Decoding is greedy from the logits, so every pass of a mode reads the same tokens."""

    def __init__(self, engine: Engine, mode: str, name: str | None = None, audit: float = 0.0) -> None:
        self._engine, self._mode, self._name, self._audit = engine, mode, name or mode, audit
        self._passes = 0

    @property
    def mode(self) -> str:
        return self._name

    def measure(self, prompt: Sequence[int], decode_tokens: int) -> Sample:
        session = self._engine.session(len(prompt) + decode_tokens)
        greedy = SamplingParams()
        if self._mode == "predicted":  # other tokens in every pass
            session.audit(self._audit, self._passes)
        self._passes += 1
        started = time.perf_counter()
        session.prefill(prompt, self._mode)
        read = time.perf_counter()
        tokens = draw_tokens(session, greedy, decode_tokens + 1, self._mode)
        next(tokens)
        self._engine.traffic(reset=True)
        begun = time.perf_counter()
        for _ in tokens:
            pass
        done = time.perf_counter()
        traffic = self._engine.traffic(reset=True)
        return Sample(
            len(prompt),
            read - started,
            decode_tokens,
            done - begun,
            traffic.bytes,
            traffic.sparsity,
            traffic.selected,
            session.drafting if self._mode == LOSSLESS else None,
            session.audit_report if self._mode == "predicted" else None,
        )
