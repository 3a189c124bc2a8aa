"""One sequence: what it has read, and the ways to go on."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

from turbosparse import _native
from turbosparse.engine.audit import AuditReport, Move
from turbosparse.engine.drafting import Drafting
from turbosparse.engine.modes import AUTOMATIC, LOSSLESS
from turbosparse.engine.sampler import SamplingParams, sample
from turbosparse.errors import UserError

if TYPE_CHECKING:
    from turbosparse.engine.engine import Engine

Floats = npt.NDArray[np.float32]


class Session:
    """One sequence: a KV cache and the position in it. Made by `Engine.session`."""

    def __init__(self, engine: Engine, context: int, cache: Type) -> None:
        self._engine = engine
        self._native = _native.Session(engine._model, context, int(cache))
        self._speculation: _native.Speculation | None = None
        self._audited = 0.0
        self._last: Floats | None = None

    @property
    def position(self) -> int:
        """Tokens in the cache."""
        return self._native.position

    @property
    def context(self) -> int:
        """Tokens that fit."""
        return self._native.context

    @property
    def cache_bytes(self) -> int:
        """Bytes that its keys and values take when the context is full; memory is taken as it fills."""
        return self._native.cache_bytes

    def used(self, mode: str) -> str:
        """What `mode` came to in the last decoded token: itself, or for an automatic one the mode of all layers.

        Where the layers differ it is `mode` still, and while the rates are counted it is exact.
        """
        if mode == LOSSLESS:
            return mode
        mode = self._engine.native_mode(mode)
        chosen = set(self.choices)
        return chosen.pop() if mode in AUTOMATIC and len(chosen) == 1 else mode

    @property
    def choices(self) -> tuple[str, ...]:
        """How the automatic modes compute each layer; exact while they still count, which is for 16 tokens."""
        return tuple(self._native.choices)

    def reset(self) -> None:
        """Forget everything."""
        self.truncate(0)

    def truncate(self, position: int) -> int:
        """Forget all tokens from `position` on; what is kept has the bits that it had.

        A layer that slides keeps little beyond its window: where it no longer holds what the next token would see,
        everything is forgotten. Returns the position reached, `position` or 0.
        """
        self._last = None
        return self._native.truncate(position)

    def keep_prefix(self, tokens: Sequence[int]) -> int:
        """Forget all but the tokens that `tokens` begins with too, and return how many these are.

        The last of `tokens` is not among them: it is what the next logits come from, so it has to be read.
        """
        pairs = zip(self._native.tokens, tokens[:-1], strict=False)
        kept = next((index for index, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
        return self.truncate(min(self.position, len(tokens) - 1) if kept is None else kept)

    def prefill(self, tokens: Sequence[int], mode: str = "dense") -> Floats:
        """Read a prompt; returns the logits after its last token, float32 [vocab].

        In mode "predicted", and in the automatic ones, a prompt is computed exactly: together its tokens need most
        neurons anyway.

        Raises:
            UserError: it does not fit the context, or the mode is not one of the engine's.
        """
        self._check(tokens, mode)
        for start in range(0, len(tokens), _native.PREFILL_BLOCK):  # a call each, so that Ctrl-C is heard in between
            exactly = mode if mode == "dense" else self._engine.native_mode(LOSSLESS)
            self._last = self._read(tokens[start : start + _native.PREFILL_BLOCK], exactly)
        assert self._last is not None
        return self._last

    def logits(self, tokens: Sequence[int], mode: str = "dense") -> Floats:
        """Read tokens; returns the logits after each, as `decode` gives them: float32 [n, vocab]. Errors as there.

        Not in mode "auto-predicted", which chooses by what was decoded before.
        """
        if mode in AUTOMATIC[1:]:
            raise UserError(f"mode {mode} is for decoding; use predicted.")
        self._check(tokens, mode)
        flat = self._read(tokens, self._engine.native_mode(mode), all_logits=True)
        rows = flat.reshape(len(tokens), self._engine.config.vocab_size)
        self._last = rows[-1]
        return rows

    def decode(self, token: int, mode: str = "dense") -> Floats:
        """Read one token in one native call; returns the logits after it, float32 [vocab]. Errors as in `prefill`."""
        self._engine.decode_batch((self,), (token,), mode)
        assert self._last is not None
        return self._last

    def sample(self, params: SamplingParams) -> int:
        """Draw the next token from the last logits; it still has to be decoded."""
        if self._last is None:
            raise ValueError("no logits to sample from: read a token first; one that was read by draw leaves none")
        history = self._native.tokens if params.repetition_penalty != 1.0 else []
        return sample(self._last, params, history, self.position)

    def draw(self, token: int, params: SamplingParams, mode: str = "dense") -> int:
        """Read one token and draw the next, in one native call: what `decode` and `sample` give, in less time.

        Most logits are only known to be too small (csrc/sketch.h), so there are none to `sample` from afterwards. With
        top_k or top_p, which need all of them, it takes as long. The eighth draw of an engine makes what that needs.

        Raises:
            UserError: as `prefill`.
        """
        self._check((token,), mode)
        self._last = None
        return self._engine._forward.draw(self._native, token, self._engine.native_mode(mode), *params.values)

    def decode_ahead(
        self, token: int, params: SamplingParams, most: int, ends: Collection[int] = frozenset()
    ) -> list[int]:
        """Read one token, and as many of those that follow as drafts foresee: mode lossless, in one native call.

        Args:
            token: to read, as in `decode`.
            params: how tokens are drawn.
            most: tokens to return at most.
            ends: tokens after which none is drawn.

        Returns:
            What `decode` in mode exact and `sample` give one by one, at least one token. All of them but the last have
            been read too.

        Raises:
            UserError: as `prefill`.
        """
        self._check((token,), LOSSLESS)
        out = np.empty(self._engine.config.vocab_size, np.float32)
        drawn = self._ahead.next(token, most, list(ends), *params.values, out)
        self._last = out
        return drawn

    def audit(self, share: float, seed: int = 0) -> None:
        """Audit this share of the tokens that are decoded in predicted mode, drawn by `seed`; 0, none, costs nothing.

        Thresholds that no longer keep what the file promises are moved in this session; `audit_report` tells.

        Raises:
            UserError: it is no share.
        """
        if not 0 <= share <= 1:
            raise UserError(f"--audit {share:g}: give a share of the tokens from 0 to 1; 0 audits none.")
        self._audited = share
        self._native.begin_audit(share, seed, self._promised or [0.0] * self._engine.config.n_layers)

    @property
    def audit_report(self) -> AuditReport:
        """What the audit found so far."""
        verdicts, sums, moves = self._native.audit
        moved = tuple(Move(*each) for each in moves)
        return AuditReport(self._audited, self._promised, tuple(verdicts), tuple(sums), moved)

    @property
    def _promised(self) -> tuple[float, ...] | None:
        predictor = self._engine.config.predictor
        return predictor.recall if predictor is not None else None

    def follow(self, tokens: Sequence[int], agrees: Sequence[bool]) -> None:
        """For benchmarks: `decode_ahead` draws this text, whatever the logits say; both [tokens], by position.

        `agrees` says whether a predicted draft of a token is right. So the speed of a shape that nobody has trained can
        be timed at the acceptance of a model that somebody has.
        """
        self._ahead.follow(list(tokens), [int(each) for each in agrees])

    @property
    def drafting(self) -> Drafting:
        """What mode lossless did in this session."""
        return Drafting(*self._ahead.drafting)

    @property
    def _ahead(self) -> _native.Speculation:
        if self._speculation is None:
            engine = self._engine
            predicts, dense = "predicted" in engine.modes, not engine.config.sparse
            self._speculation = _native.Speculation(engine._forward, self._native, engine._costs, predicts, dense)
        return self._speculation

    def _check(self, tokens: Sequence[int], mode: str) -> None:
        if not tokens:
            raise UserError("the prompt holds no tokens; give it some text.")
        if len(tokens) > self.context - self.position:
            raise UserError(
                f"{len(tokens)} tokens do not fit the context of {self.context}, {self.position} of it used; use --ctx."
            )
        if mode not in (*self._engine.modes, *self._engine.automatic_modes, LOSSLESS):
            known = ", ".join(self._engine.modes)
            activation = self._engine.config.activation
            raise UserError(f"mode {mode} is not possible with this {activation} model; use {known}.")

    def _read(self, tokens: Sequence[int], mode: str, all_logits: bool = False) -> Floats:
        rows = len(tokens) if all_logits else 1
        out = np.empty(rows * self._engine.config.vocab_size, np.float32)
        self._engine._forward.read(self._native, np.asarray(tokens, np.int32), mode, all_logits, out)
        return out
