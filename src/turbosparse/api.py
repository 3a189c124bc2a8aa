"""The functions that `import turbosparse` offers: what the command line does, for Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from turbosparse.engine import Engine, SamplingParams


def load(
    model: str | PathLike[str],
    threads: int | None = None,
    compute: str = "int8",
    progress: Callable[[int, int], None] | None = None,
) -> Engine:
    """Load a model to run.

    Args:
        model: a GGUF file, a bundled name or a hub id.
        threads: default: every core that this process may use.
        compute: "int8" (fast) or "f32" (the yardstick).
        progress: called with (bytes done, bytes in all).

    Raises:
        UserError: there is no such model, or it cannot be run.
    """
    from turbosparse.engine import Engine
    from turbosparse.model.resolve import resolve_gguf

    return Engine.load(
        resolve_gguf(Path(model) if isinstance(model, PathLike) else model), threads, compute, None, progress
    )


def generate(
    engine: Engine,
    prompt: str,
    max_tokens: int = 128,
    params: SamplingParams | None = None,
    mode: str | None = None,
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """Continue a text; yields it piece by piece, so that it can be shown as it grows. Join the pieces for the whole.

    Args:
        engine: from `load`.
        prompt: plain text; what looks like a control token in it is text.
        max_tokens: at most this many.
        params: how tokens are drawn; default: always the likeliest.
        mode: "dense", "exact" or "lossless" (exact from verified drafts), which give the same text, or "predicted"
            where the file holds predictors; default: auto, which is whichever of the first two costs less.
        stop: strings that end the text; they are not part of it.

    Raises:
        UserError: prompt and answer do not fit the context, or an option cannot be used.
    """
    from turbosparse.engine import generate as stream

    chunks = stream(engine, engine.tokenizer.encode(prompt), params, max_tokens, mode or "auto", stop)
    return (chunk.text for chunk in chunks)


def convert(source: str | PathLike[str], out: str | PathLike[str], activation: str = "drelu") -> dict[str, Any]:
    """Swap the activation of every FFN; see `turbosparse.relufy.convert.convert`. Needs turbosparse[train]."""
    from turbosparse.relufy.convert import convert as swap

    return swap(str(source), Path(out), activation)
