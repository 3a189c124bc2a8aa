"""The dense twin of a model: given by the user, or for a synthetic model made on the fly."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from turbosparse.engine import Engine
from turbosparse.errors import UserError
from turbosparse.model.gguf import GGUFFile
from turbosparse.model.quantize import Type
from turbosparse.model.resolve import resolve_gguf
from turbosparse.model.synthetic import Rates, write_synthetic

_QUANTS = {Type.Q4_0: "q4_0", Type.Q8_0: "q8_0", Type.F16: "f16"}


@contextmanager
def dense_twin_of(model: str, engine: Engine, given: str | None, needed: bool) -> Iterator[Path | None]:
    """The file of the dense twin, while the block runs.

    Args:
        model: what the user called the model.
        engine: with that model.
        given: the twin's file, if the user has one.
        needed: peers will run it. A dense model is its own twin; that of a synthetic one is written to a temporary
            file, with random weights too.

    Raises:
        UserError: a twin is needed and there is none.
    """
    if given is not None:
        yield resolve_gguf(given)
    elif not needed:
        yield None
    elif not engine.config.sparse:
        yield resolve_gguf(model)
    elif not engine.config.synthetic:
        raise UserError(f"{model} is a sparse model, which peers cannot run; give its dense twin with --dense-twin.")
    else:
        with GGUFFile.open(resolve_gguf(model)) as file:
            quant = _QUANTS[file.tensors["blk.0.attn_output.weight"].type]
        config = dataclasses.replace(
            engine.config, activation="swiglu", predictor=None, neurons_per_gate=1, mirrored_ups=False
        )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "dense-twin.gguf"
            write_synthetic(path, "dense twin", config, Rates(0.5, 0.5, 0.25), quant)
            yield path
