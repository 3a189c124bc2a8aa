"""Continue a prompt token by token, as a stream of text."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

from turbosparse.engine.engine import Engine
from turbosparse.engine.modes import LOSSLESS
from turbosparse.engine.sampler import SamplingParams
from turbosparse.engine.session import Session
from turbosparse.errors import UserError


@dataclass(frozen=True)
class Chunk:
    """One token, and the text that is certain now that it is there (it may be empty).

    `finish` is None but in the last chunk: "eos", "stop" (a stop string came) or "length".
    """

    token: int
    text: str
    finish: str | None = None


class _StopStrings:
    """Holds back text that may turn out to be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not stop for stop in stops):
            raise UserError("a stop string is empty; leave it out.")
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that can be shown, whether a stop string was found)."""
        self._held += text
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            shown, self._held = self._held[: min(found)], ""
            return shown, True
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown, False

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if self._held.endswith(stop[:size])), 0)

    def rest(self) -> str:
        held, self._held = self._held, ""
        return held


def generate(
    engine: Engine,
    prompt: Sequence[int],
    params: SamplingParams | None = None,
    max_tokens: int = 128,
    mode: str = "dense",
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
    session: Session | None = None,
) -> Iterator[Chunk]:
    """Continue a prompt.

    Args:
        prompt: token ids, at least one; they follow what `session` holds already.
        params: how tokens are drawn; default greedy.
        max_tokens: at most this many; the whole must fit the context.
        mode: one of `engine.modes` or `engine.automatic_modes`, or "lossless", which writes what "exact" writes.
        stop: strings that end the text; they are not part of it.
        ignore_eos: go on after the tokens that end a text.
        session: continue in this one; default: a new one.

    Raises:
        UserError: prompt and answer do not fit the context, or an option cannot be used.
    """
    params = params or SamplingParams()
    session = session or engine.session()
    needed = session.position + len(prompt) + max_tokens
    if needed > session.context:
        raise UserError(
            f"the prompt of {len(prompt)} tokens and {max_tokens} new ones do not fit the context of {session.context} "
            f"({session.position} used); give a shorter prompt, fewer tokens (-n) or a larger --ctx."
        )
    session.prefill(prompt, mode)
    return _stream(engine, session, params, max_tokens, mode, _StopStrings(stop), ignore_eos)


def _stream(
    engine: Engine,
    session: Session,
    params: SamplingParams,
    max_tokens: int,
    mode: str,
    stops: _StopStrings,
    ignore_eos: bool,
) -> Iterator[Chunk]:
    text = engine.tokenizer.stream()
    ends = frozenset() if ignore_eos else engine.tokenizer.eos_ids
    with closing(draw_tokens(session, params, max_tokens, mode, ends)) as tokens:
        for index, token in enumerate(tokens):
            if token in ends:
                yield Chunk(token, _tail(stops, text.finish()), "eos")
                return
            shown, stopped = stops.push(text.step(token))
            if stopped:
                yield Chunk(token, shown, "stop")
                return
            if index == max_tokens - 1:
                yield Chunk(token, shown + _tail(stops, text.finish()), "length")
                return
            yield Chunk(token, shown)


def draw_tokens(
    session: Session, params: SamplingParams, max_tokens: int, mode: str, ends: Collection[int] = frozenset()
) -> Generator[int, None, None]:
    """Token after token, from a session that has read a prompt; one is read when the next is asked for.

    Whenever it is left the session holds all but the last token that it gave. Mode lossless draws none after `ends`.
    """
    token = session.sample(params)
    if mode != LOSSLESS:
        yield token
        for _ in range(max_tokens - 1):
            token = session.draw(token, params, mode)
            yield token
        return
    given, read = 1, session.position
    try:
        yield token
        while given < max_tokens:
            for following in session.decode_ahead(token, params, max_tokens - given, ends):
                token, given = following, given + 1
                yield token
    finally:
        if session.position > read + given - 1:
            session.truncate(read + given - 1)


def _tail(stops: _StopStrings, text: str) -> str:
    shown, stopped = stops.push(text)
    return shown if stopped else shown + stops.rest()
