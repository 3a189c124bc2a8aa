"""What every stage that runs a model does first: find the file, load it, choose the mode."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbosparse.cli import output
from turbosparse.cli.options import Compute, Isa, Mode

if TYPE_CHECKING:
    from turbosparse.engine import Engine


def load_engine(model: str, threads: int | None, compute: Compute = Compute.int8, isa: Isa | None = None) -> Engine:
    """The model that `model` names (a file, a bundled name or a hub id), in memory.

    Raises:
        UserError: there is no such model, or it cannot be run.
    """
    from turbosparse.engine import Engine
    from turbosparse.model.resolve import resolve_gguf

    path = resolve_gguf(model)
    with output.progress(f"loading {path.name}") as report:
        return Engine.load(path, threads, compute.value, isa.value if isa else None, report)


def reading_mode(engine: Engine, mode: Mode) -> str:
    """For text that is read and not continued `auto` is exact where the file allows it: the same with less work.

    So is `lossless`, which drafts what is not there yet.
    """
    if mode in (Mode.auto, Mode.lossless):
        return "exact" if "exact" in engine.modes else "dense"
    return mode.value
