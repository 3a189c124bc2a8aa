"""Perplexity of a text, with the engine or with transformers, by the same windows and the same arithmetic.

A window stands alone: its first token is given, and tokens 2..n are predicted from those before them in the window.
nats per token = - mean log p(token | before), perplexity = exp of it (Jelinek et al. 1977).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from turbosparse.errors import UserError
from turbosparse.evaluate.windows import WINDOW, windows
from turbosparse.folders import PlainTokenizer, load_folder
from turbosparse.model.config import ModelConfig

Floats = npt.NDArray[np.floating[Any]]
Progress = Callable[[int, float], None]
"""Called after each window with the tokens predicted so far and their mean nats."""

# A window of Gemma's vocabulary is 2^28 logits. The engine is asked for this many at a time: 16 MiB of float32 stay in
# the cache and are not mapped anew by every call; and this many are held as float64 (32 MiB).
_LOGITS_ASKED = 1 << 22
_LOGITS_IN_FLOAT64 = 1 << 22


class Session(Protocol):
    """What is needed of `turbosparse.engine`'s session."""

    def reset(self) -> None: ...

    def logits(self, tokens: Sequence[int], mode: str) -> npt.NDArray[np.float32]: ...


class Engine(Protocol):
    """What is needed of `turbosparse.engine.Engine`."""

    @property
    def config(self) -> ModelConfig: ...

    def session(self, context: int) -> Session: ...


@dataclass(frozen=True)
class PerplexityResult:
    """`tokens` were predicted, at `nats_per_token` on average; perplexity = exp(nats_per_token)."""

    mode: str
    tokens: int
    nats_per_token: float
    perplexity: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def negative_log_likelihoods(logits_NV: Floats, targets_N: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """-log softmax(logits)[target] of every row, in nats. Logits [n, vocab], targets [n].

    Exponentials are float32 and sums float64: right to about 1e-6 nats.
    """
    targets = np.asarray(targets_N, dtype=np.int64)
    out = np.empty(len(targets), np.float64)
    for rows in _chunks(logits_NV):
        highest = logits_NV[rows].max(axis=1, keepdims=True)
        shifted = logits_NV[rows] - highest
        chosen = logits_NV[rows][np.arange(len(shifted)), targets[rows]] - highest[:, 0].astype(np.float64)
        np.exp(shifted, out=shifted)
        out[rows] = np.log(shifted.sum(axis=1, dtype=np.float64)) - chosen
    return out


def perplexity_engine(
    engine: Engine, token_windows: Iterable[Sequence[int]], mode: str, progress: Progress | None = None
) -> PerplexityResult:
    """Perplexity of `token_windows` (see `windows.windows`) as the engine runs them in `mode`.

    Raises:
        UserError: the model gives a logit that is not a number, or there is no token to predict.
    """
    session: Session | None = None
    context = 0
    total = _Total(mode, progress)
    for window in token_windows:
        if session is None or len(window) > context:
            context = len(window)
            session = engine.session(context=context)
        session.reset()
        for part in _parts(len(window) - 1, engine.config.vocab_size):
            targets = window[part.start + 1 : part.stop + 1]
            total.add(negative_log_likelihoods(session.logits(window[part], mode), targets))
        total.show()
    return total.result()


def perplexity_hf(
    model_dir: str | Path,
    path: str | Path,
    length: int = WINDOW,
    limit: int | None = None,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Perplexity of the text in `path` for a Hugging Face folder, in float32; mode is "hf".

    Raises:
        UserError: torch is not installed, the folder is not a causal language model, or as `perplexity_engine`.
    """
    tokenizer, model = load_folder(model_dir)
    import torch

    total = _Total("hf", progress)
    for window in windows(PlainTokenizer(tokenizer), path, length, limit):
        with torch.inference_mode():
            logits = model(torch.tensor([window[:-1]], device=model.device)).logits[0]
        total.add(negative_log_likelihoods(logits.float().cpu().numpy(), window[1:]))
        total.show()
    return total.result()


def kl_divergence(
    engine_a: Engine,
    engine_b: Engine,
    token_windows: Iterable[Sequence[int]],
    mode_a: str = "dense",
    mode_b: str | None = None,
    progress: Progress | None = None,
) -> float:
    """Mean over all positions of KL(a || b) in nats: what is lost when b stands in for a.

    Raises:
        UserError: as `perplexity_engine`, or the vocabularies differ.
    """
    if engine_a.config.vocab_size != engine_b.config.vocab_size:
        sizes = f"{engine_a.config.vocab_size} and {engine_b.config.vocab_size}"
        raise UserError(f"The models have {sizes} tokens; compare models of one vocabulary.")
    total = _Total("kl", progress)
    sessions: tuple[Session, Session] | None = None
    context = 0
    for window in token_windows:
        if sessions is None or len(window) > context:
            context = len(window)
            sessions = (engine_a.session(context=context), engine_b.session(context=context))
        for session in sessions:
            session.reset()
        for part in _parts(len(window), engine_a.config.vocab_size):
            a_NV, b_NV = sessions[0].logits(window[part], mode_a), sessions[1].logits(window[part], mode_b or mode_a)
            total.add(_divergences(a_NV, b_NV))
        total.show()
    return total.result().nats_per_token


def _parts(length: int, vocabulary: int) -> Iterable[slice]:
    """A window in parts whose logits fit into memory; the session's cache carries from one to the next."""
    return _slices(length, max(1, _LOGITS_ASKED // vocabulary))


def _divergences(a_NV: Floats, b_NV: Floats) -> npt.NDArray[np.float64]:
    out = np.empty(len(a_NV), np.float64)
    for rows in _chunks(a_NV):
        log_a, log_b = _log_softmax(a_NV[rows]), _log_softmax(b_NV[rows])
        probability = np.exp(log_a)
        # Where a is exactly 0 the term is 0, whatever b is (and -inf minus -inf is no number).
        with np.errstate(invalid="ignore"):
            terms = np.where(probability > 0, probability * (log_a - log_b), 0.0)
        out[rows] = terms.sum(axis=1)
    return out


def _log_softmax(logits_NV: Floats) -> npt.NDArray[np.float64]:
    shifted = logits_NV.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def _chunks(logits_NV: Floats) -> Iterable[slice]:
    rows, vocabulary = logits_NV.shape
    return _slices(rows, max(1, _LOGITS_IN_FLOAT64 // vocabulary))


def _slices(length: int, step: int) -> Iterable[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


class _Total:
    """A running mean that refuses what is not a number."""

    def __init__(self, mode: str, progress: Progress | None) -> None:
        self._mode, self._progress = mode, progress
        self._sums: list[float] = []
        self._tokens = 0

    def add(self, values: npt.NDArray[np.float64]) -> None:
        if np.isnan(values).any():
            raise UserError(f"The model gives logits that are not numbers in mode {self._mode}; its file is damaged.")
        self._sums.append(math.fsum(values))
        self._tokens += len(values)

    def show(self) -> None:
        if self._progress is not None and self._tokens:
            self._progress(self._tokens, math.fsum(self._sums) / self._tokens)

    def result(self) -> PerplexityResult:
        if not self._tokens:
            raise UserError("There is no token to predict; give a longer text.")
        nats = math.fsum(self._sums) / self._tokens
        return PerplexityResult(self._mode, self._tokens, nats, math.exp(nats) if nats < 700 else math.inf)
