"""From a sparse model and a text to the model with predictors: collect, fit and measure layer by layer, write."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from turbosparse.errors import UserError
from turbosparse.evaluate.windows import windows
from turbosparse.model.config import ModelConfig
from turbosparse.model.export import export_gguf
from turbosparse.model.gguf import GGUFFile
from turbosparse.model.resolve import resolve_gguf
from turbosparse.model.tokenizer import Tokenizer
from turbosparse.predict.folder import save_folder
from turbosparse.predict.gates import gates_are_ternary
from turbosparse.predict.joint import Joint
from turbosparse.predict.measure import LayerQuality
from turbosparse.predict.wish import Wish
from turbosparse.predict.work import Progress, Work
from turbosparse.predict.write import write_predictors

_LENGTH = 512  # tokens of a window
_FEWEST_WINDOWS = 16


@dataclass(frozen=True)
class Report:
    """What was written, and what the layers' predictors do on held-out tokens."""

    out: Path
    tokens: int
    layers: tuple[LayerQuality, ...]

    def mean(self, name: str) -> float:
        """Mean over layers of a number of `LayerQuality`."""
        return float(np.mean([getattr(layer, name) for layer in self.layers]))

    def to_json(self) -> dict[str, Any]:
        names = ("rank", "bytes_share", "mass_kept", "recall", "selected", "active", "nats_lost")
        return {
            "output": str(self.out),
            "tokens": self.tokens,
            "mean": {name: self.mean(name) for name in names},
            "layers": [layer.to_json() for layer in self.layers],
        }


def train_predictors(
    model: str | Path, data: Path, out: Path, wish: Wish, replace: bool = False, progress: Progress | None = None
) -> Report:
    """Fit a predictor for every layer of a sparse model, or let its gates predict, and write the model with them.

    Args:
        model: a GGUF file or what else `resolve_gguf` takes, or a Hugging Face folder, which is stored as Q4_0 first
            and gets the predictors as a file of its own, for later exports.
        data: text; what the predictors learn from and, every eighth window of it, are measured on.
        out: the GGUF file to write. Beside it lies `OUT.partial/` until it is whole, from which an interrupted run of
            the same wish goes on, but for one that is held in memory.
        wish: size and quality.
        replace: the model may have predictors, which are dropped.
        progress: called with (done, total).

    Raises:
        UserError: the model, the text or the wish cannot be used.
    """
    out = Path(out)
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"--out {out}: give the path of a GGUF file in a folder that exists.")
    folder = out.with_name(f"{out.name}.partial")
    _same_work(folder, _identity(Path(model), data, wish))
    source = _as_gguf(model, folder)
    with GGUFFile.open(source) as file:
        config = ModelConfig.from_gguf(file)
        _check_model(source, config, wish, replace)
        if wish.gates is None:
            wish = dataclasses.replace(wish, gates=not wish.trains_by_choice and gates_are_ternary(file, config))
        pieces = _windows(file, config, data, wish.tokens)
        report = progress or (lambda done, total: None)
        in_memory = wish.together or wish.end_to_end > 0
        work = (
            Joint(file, config, pieces, wish, report) if in_memory else Work(file, config, pieces, wish, folder, report)
        )
        layers = work.run()
        write_predictors(file, out, [stored for stored, _ in layers])
    if Path(model).is_dir():
        save_folder(Path(model), [stored for stored, _ in layers])
    shutil.rmtree(folder)
    return Report(out, len(pieces) * len(pieces[0]), tuple(measured for _, measured in layers))


def _as_gguf(model: str | Path, folder: Path) -> Path:
    if not Path(model).is_dir():
        return resolve_gguf(model)
    path = folder / "model.gguf"
    if not path.exists():
        export_gguf(Path(model), path, "q4_0")
    return path


def _check_model(source: Path, config: ModelConfig, wish: Wish, replace: bool) -> None:
    if not config.sparse:
        raise UserError(f"{source} is a dense {config.activation} model; predictors are for sparse ones: convert it.")
    if config.experts:
        raise UserError(f"{source} is a mixture of experts; predictors are trained for models with one FFN a layer.")
    if wish.keep:
        if config.predictor is None or not all(config.predictor.ranks) or config.predictor.input != "normed":
            raise UserError(f"{source} has no predictors made by this command; leave --keep out to train some.")
    elif config.predictor is not None and not replace:
        raise UserError(
            f"{source} has predictors already; set their thresholds with --keep, or drop them with --replace."
        )


def _windows(file: GGUFFile, config: ModelConfig, data: Path, limit: int) -> list[list[int]]:
    length = min(_LENGTH, config.context_length)
    pieces = [piece for piece in windows(Tokenizer.from_gguf(file), data, length, limit) if len(piece) == length]
    if len(pieces) < _FEWEST_WINDOWS:
        raise UserError(
            f"{data} gives {len(pieces)} windows of {length} tokens where {_FEWEST_WINDOWS} are the fewest to learn "
            "from; give more text, or a higher --tokens."
        )
    return pieces


def _identity(model: Path, data: Path, wish: Wish) -> str:
    """What a run depends on; files count as the same by size and time of change."""
    places = [model / "config.json" if model.is_dir() else model, data]
    files = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in places if path.is_file()]
    return json.dumps([str(model), files, vars(wish)])


def _same_work(folder: Path, identity: str) -> None:
    """Make the folder, or keep it if it holds the work of the same run."""
    name = folder / "run.json"
    if folder.is_dir() and name.is_file() and name.read_text() == identity:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    name.write_text(identity)
