"""`turbosparse chat`: talk with a model that has a chat template."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from turbosparse.cli import modes, options, output
from turbosparse.cli.loading import load_engine
from turbosparse.errors import UserError

if TYPE_CHECKING:
    from turbosparse.engine import Engine, SamplingParams, Session

_HELP = "Type a message; /reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer."


def command(
    model: options.Model,
    system: Annotated[str | None, typer.Option("--system", help="Instructions that stand before the talk.")] = None,
    tokens: options.MaxTokens = 512,
    mode: options.ModeOption = options.Mode.auto,
    audit: options.Audit = options.AUDIT,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = 0,
    stop: options.Stop = None,
    threads: options.Threads = None,
    ctx: options.ContextLength = None,
    kv_cache: options.KvCacheOption = None,
    compute: options.ComputeOption = options.Compute.int8,
    isa: options.IsaOption = None,
) -> None:
    """Talk with a model, turn by turn. Works with piped input too: one message a line."""
    from turbosparse.engine import SamplingParams

    params = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    engine = load_engine(model, threads, compute, isa)
    session = engine.session(ctx, kv_cache)
    modes.begin(session, mode, audit, seed)
    chat = Conversation(engine, session, mode.value, params, tokens, stop or [], system)
    interactive = sys.stdin.isatty()
    if interactive:
        output.notice(_HELP)
    while (message := _read(interactive)) is not None:
        if message in ("/exit", "/quit"):
            break
        if message == "/reset":
            chat.forget()
        elif message:
            try:
                chat.answer(message)
            except KeyboardInterrupt:
                print()
            except UserError as error:
                if not interactive:
                    raise
                output.notice(f"turbosparse: {error}")  # a person at a terminal can still /reset
    for line in modes.lines(modes.record(session, mode)):
        output.notice(line)


def _read(interactive: bool) -> str | None:
    """The next message, or None at the end of the input."""
    try:
        return (input("> ") if interactive else input()).strip()
    except EOFError:
        return None
    except UnicodeDecodeError:
        raise UserError("stdin is not UTF-8 text; convert it first.") from None


class Conversation:
    """Messages so far, and a session that has read as many of their tokens as still hold.

    The whole conversation is rendered and tokenised every turn, because a template may write a turn differently once it
    is not the last one; only what changed is read again.
    """

    def __init__(
        self,
        engine: Engine,
        session: Session,
        mode: str,
        params: SamplingParams,
        max_tokens: int,
        stop: list[str],
        system: str | None,
    ) -> None:
        self._engine, self._session, self._mode = engine, session, mode
        self._params, self._max_tokens, self._stop = params, max_tokens, stop
        self._system = [{"role": "system", "content": system}] if system else []
        self.forget()

    def forget(self) -> None:
        """Begin again, with the system message."""
        self._messages = list(self._system)
        self._read: list[int] = []
        self._session.reset()

    def answer(self, message: str) -> None:
        """Print the answer to a message as it is generated.

        Raises:
            UserError: the conversation no longer fits the context; nothing is cut.
        """
        from turbosparse.engine import generate

        messages = [*self._messages, {"role": "user", "content": message}]
        prompt = self._engine.tokenizer.apply_chat_template(messages)
        ids = self._engine.tokenizer.encode(prompt, add_bos=False, parse_special=True)
        room = self._session.context - len(ids)
        if room < 1:
            raise UserError(
                f"the conversation of {len(ids)} tokens does not fit the context of {self._session.context}; "
                "start again with /reset, or use a larger --ctx."
            )
        new = self._unread(ids)
        said: list[str] = []
        limit = min(self._max_tokens, room)
        chunks = generate(self._engine, new, self._params, limit, self._mode, self._stop, session=self._session)
        self._read = list(ids)
        try:
            previous = None
            for chunk in chunks:
                if previous is not None:
                    self._read.append(previous)  # a token is in the cache once the next one is there
                previous = chunk.token
                said.append(chunk.text)
                print(chunk.text, end="", flush=True)
                if chunk.finish == "length" and limit < self._max_tokens:
                    output.notice(f"\n[the context of {self._session.context} tokens is full: the answer ends here]")
            print()
        finally:
            self._read = self._read[: self._session.position]
            self._messages = [*messages, {"role": "assistant", "content": "".join(said)}]

    def _unread(self, ids: list[int]) -> list[int]:
        """What of `ids` the session has yet to read; it starts over where the talk was written differently before."""
        known = len(self._read)
        if self._session.position == known < len(ids) and self._read == ids[:known]:
            return ids[known:]
        self._session.reset()
        return ids
