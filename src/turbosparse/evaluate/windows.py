"""A text as windows of token ids, side by side."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from turbosparse.documents import read_documents
from turbosparse.errors import UserError

if TYPE_CHECKING:
    from turbosparse.engine import Engine

WINDOW = 1024


class TextTokenizer(Protocol):
    """What windows need of a tokenizer: `turbosparse.model.tokenizer.Tokenizer` has it."""

    eos_id: int | None

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]: ...


def windows(
    tokenizer: TextTokenizer, path: str | Path, length: int = WINDOW, limit: int | None = None
) -> Iterator[list[int]]:
    """Windows of the file's documents, joined by EOS, in order.

    All have `length` tokens but the last, which keeps the tail. A tail of one token predicts nothing and is left out.

    Args:
        tokenizer: its EOS stands between documents; without one nothing does. BOS is never put in.
        path: as for `read_documents`.
        length: tokens of a window, at least 2.
        limit: stop after this many tokens of text.

    Raises:
        UserError: the file cannot be read, or holds less than two tokens.
    """
    if length < 2:
        raise UserError(f"A window of {length} tokens predicts nothing; give at least 2.")
    empty = True
    window: list[int] = []
    for token in _tokens(tokenizer, path, limit):
        window.append(token)
        if len(window) == length:
            yield window
            window, empty = [], False
    if len(window) > 1:
        yield window
    elif empty:
        raise UserError(f"{path} holds less than two tokens of text; give a longer text.")


def engine_windows(engine: Engine, path: str | Path, limit: int | None = None) -> list[list[int]]:
    """The windows of a file as tokens of the engine's model, all at once, so that their number is known.

    Raises:
        UserError: as `windows`, or a window is longer than the model's context.
    """
    pieces = list(windows(engine.tokenizer, path, limit=limit))
    longest, context = max(map(len, pieces)), engine.config.context_length
    if longest > context:
        raise UserError(
            f"A window of {longest} tokens is longer than this model's context of {context}; "
            f"read less of {path} with --limit {context}."
        )
    return pieces


def _tokens(tokenizer: TextTokenizer, path: str | Path, limit: int | None) -> Iterator[int]:
    left = limit if limit is not None else 1 << 62
    for index, text in enumerate(read_documents(path)):
        ids = tokenizer.encode(text, add_bos=False)
        if index and tokenizer.eos_id is not None:
            ids = [tokenizer.eos_id, *ids]
        yield from ids[:left]
        left -= len(ids)
        if left <= 0:
            return
