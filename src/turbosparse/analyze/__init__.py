"""See where a model is sparse: per layer and per neuron, from a Hugging Face folder or from the engine's counters.

The package can be called: `turbosparse.analyze(model, "text.jsonl")` is `analyze` below. Name and function would hide
each other otherwise, whichever of them is imported last.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from turbosparse.analyze.statistics import LayerSparsity, SparsityReport, summarise

if TYPE_CHECKING:
    from turbosparse.engine import Engine

__all__ = ["LayerSparsity", "SparsityReport", "analyze", "summarise"]


def analyze(
    model: Engine | str | PathLike[str],
    data: str | PathLike[str],
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SparsityReport:
    """How sparse a model is on a text. Engine and folder read the same windows, so their figures agree.

    Args:
        model: a loaded engine, a GGUF file or what else `turbosparse.load` takes, or a Hugging Face folder, which needs
            turbosparse[train].
        data: plain text or JSON lines, also .zst.
        limit: read at most this many tokens.
        progress: called with (tokens done, tokens in all, 0 where that is not known).

    Raises:
        UserError: the model or the text cannot be used.
    """
    from turbosparse.analyze.capture import capture_engine, capture_hf

    total = limit or 0

    def report(done: int) -> None:
        if progress is not None:
            progress(done, total)

    if isinstance(model, str | PathLike) and Path(model).is_dir():
        return capture_hf(Path(model), Path(data), limit, report)
    from turbosparse.api import load
    from turbosparse.evaluate.windows import engine_windows

    engine = load(model) if isinstance(model, str | PathLike) else model
    pieces = engine_windows(engine, Path(data), limit)
    total = sum(map(len, pieces))
    return capture_engine(engine, pieces, report)


class _Callable(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> SparsityReport:
        return analyze(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
