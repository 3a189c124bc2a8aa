"""From a sparse model and a text to the model with predictors: collect, fit and measure layer by layer, write."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type

from turbosparse.errors import UserError
from turbosparse.evaluate.windows import windows
from turbosparse.model.config import ModelConfig
from turbosparse.model.export import export_gguf
from turbosparse.model.gguf import GGUFFile, row_bytes
from turbosparse.model.quantize import WRITABLE, dequantize, quantize, writable_type
from turbosparse.model.resolve import resolve_gguf
from turbosparse.model.tokenizer import Tokenizer
from turbosparse.predict.collect import Collector, firing_spectra
from turbosparse.predict.fit import Tokens, fit
from turbosparse.predict.measure import LayerQuality, quality, threshold_for
from turbosparse.predict.ranks import BLOCK, share_out
from turbosparse.predict.write import StoredPredictor, write_predictors

_LENGTH = 512  # tokens of a window
_FEWEST_WINDOWS = 16
_HELD_OUT = 8  # of so many windows, one sets the threshold or, every other time, is measured on
_SPECTRUM_WINDOWS = 16
_SEED = 1

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Wish:
    """What is asked for.

    Attributes:
        share: bytes of all predictors over those of the dense FFNs; not looked at where there is a `rank`.
        rank: rows of every layer's fc1.
        recall: share of the |h| mass that thresholds must keep.
        tokens: to read at most.
        epochs: how often the tokens are gone through when a layer is fitted.
    """

    share: float = 0.10
    rank: int | None = None
    recall: float = 0.98
    tokens: int = 100_000
    epochs: float = 15.0

    def __post_init__(self) -> None:
        if self.rank is not None and (self.rank < BLOCK or self.rank % BLOCK):
            raise UserError(f"--rank {self.rank}: it must be a multiple of {BLOCK}, as weights are stored in blocks.")
        if not 0.0 < self.share <= 1.0:
            raise UserError(f"--share {self.share:g}: it must be over 0 and at most 1.")
        if not 0.0 < self.recall <= 1.0:
            raise UserError(f"--recall {self.recall:g}: it must be over 0 and at most 1.")


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
        names = ("rank", "bytes_share", "mass_kept", "recall", "selected", "active")
        return {
            "output": str(self.out),
            "tokens": self.tokens,
            "mean": {name: self.mean(name) for name in names},
            "layers": [layer.to_json() for layer in self.layers],
        }


def train_predictors(
    model: str | Path, data: Path, out: Path, wish: Wish, replace: bool = False, progress: Progress | None = None
) -> Report:
    """Fit a predictor for every layer of a sparse model and write the model with them.

    Args:
        model: a GGUF file or what else `resolve_gguf` takes, or a Hugging Face folder, which is stored as Q4_0 first.
        data: text; what the predictors learn from and, every eighth window of it, are measured on.
        out: the GGUF file to write. Beside it lies `OUT.partial/` until it is whole, from which an interrupted run of
            the same wish goes on.
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
        _check_model(source, config, replace)
        pieces = _windows(file, config, data, wish.tokens)
        work = _Work(file, config, pieces, wish, folder, progress or (lambda done, total: None))
        layers = [work.layer(index) for index in range(config.n_layers)]
        write_predictors(file, out, [stored for stored, _ in layers], wish.recall)
    shutil.rmtree(folder)
    return Report(out, len(pieces) * len(pieces[0]), tuple(measured for _, measured in layers))


class _Work:
    """One run: layers that are done lie in the folder."""

    def __init__(
        self,
        file: GGUFFile,
        config: ModelConfig,
        pieces: list[list[int]],
        wish: Wish,
        folder: Path,
        progress: Progress,
    ) -> None:
        self._file, self._config, self._wish, self._folder, self._progress = file, config, wish, folder, progress
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._collector = Collector(file, config, pieces, folder, self._device)
        which = np.repeat(np.arange(len(pieces)) % (2 * _HELD_OUT), len(pieces[0]))
        self._tuned, self._measured = which == _HELD_OUT - 1, which == 2 * _HELD_OUT - 1
        gate = file.tensors["blk.0.ffn_gate.weight"].type
        kind = gate if gate in WRITABLE else Type.Q8_0
        self._kinds = writable_type(kind, config.hidden_size), kind
        self._ranks = self._choose_ranks(pieces)

    def layer(self, layer: int) -> tuple[StoredPredictor, LayerQuality]:
        """A layer's predictor, fitted now or before."""
        path = self._folder / f"layer-{layer}.npz"
        if not path.exists():
            tokens = self._collector.layer(layer, lambda part: self._report(layer, part / 2))
            stored, measured = self._fit(layer, tokens)
            partial = path.with_suffix(".partial.npz")
            about = json.dumps({"threshold": stored.threshold, "quality": measured.to_json()})
            np.savez(partial, fc1=stored.fc1, fc2=stored.fc2, about=np.frombuffer(about.encode(), np.uint8))
            os.replace(partial, path)
        self._collector.finish(layer)
        self._report(layer, 1.0)
        with np.load(path) as saved:
            about = json.loads(saved["about"].tobytes())
            matrices = saved["fc1"], saved["fc2"]
        shapes = self._shapes(layer)
        return StoredPredictor(*matrices, self._kinds, shapes, about["threshold"]), LayerQuality(**about["quality"])

    def _fit(self, layer: int, tokens: Tokens) -> tuple[StoredPredictor, LayerQuality]:
        tuned, measured = (Tokens(tokens.x[part], tokens.mass[part]) for part in (self._tuned, self._measured))
        learned = ~(self._tuned | self._measured)
        rank, epochs = self._ranks[layer], self._wish.epochs
        fitted = fit(
            Tokens(tokens.x[learned], tokens.mass[learned]),
            rank,
            self._kinds[1],
            epochs,
            _SEED + layer,
            self._device,
            lambda part: self._report(layer, 0.5 + part / 2),
        )
        data = [quantize(matrix.cpu().numpy(), kind) for matrix, kind in zip(fitted, self._kinds, strict=True)]
        shapes = self._shapes(layer)
        fc1, fc2 = (  # as they are stored
            torch.from_numpy(dequantize(rows.reshape(-1), kind, shape)).to(self._device)
            for rows, kind, shape in zip(data, self._kinds, shapes, strict=True)
        )
        threshold = threshold_for(tuned, fc1, fc2, self._wish.recall)
        stored = StoredPredictor(data[0], data[1], self._kinds, shapes, threshold)
        bytes_share = stored.nbytes / self._ffn_bytes(layer)
        return stored, quality(measured, fc1, fc2, threshold, layer, bytes_share)

    def _shapes(self, layer: int) -> tuple[tuple[int, int], tuple[int, int]]:
        rank = self._ranks[layer]
        return (rank, self._config.hidden_size), (self._config.ffn_size, rank)

    def _choose_ranks(self, pieces: list[list[int]]) -> list[int]:
        """The same wherever the run was interrupted: they are kept, too."""
        if self._wish.rank is not None:
            return [self._wish.rank] * self._config.n_layers
        path = self._folder / "ranks.json"
        if not path.exists():
            layers = self._config.n_layers
            whole = sum(map(self._ffn_bytes, range(layers)))
            first, second = self._kinds
            block = BLOCK * row_bytes(first, self._config.hidden_size)
            block += self._config.ffn_size * row_bytes(second, BLOCK)
            blocks = int(self._wish.share * whole / block)
            if blocks < layers:
                needed = layers * block / whole
                raise UserError(f"--share {self._wish.share:g}: the narrowest predictors take {needed:.3f}; give more.")
            chosen = pieces[:: max(1, len(pieces) // _SPECTRUM_WINDOWS)][:_SPECTRUM_WINDOWS]
            shares = firing_spectra(self._file, self._config, chosen, self._device, lambda part: self._report(-1, part))
            path.write_text(json.dumps(share_out(shares, blocks)))
        ranks: list[int] = json.loads(path.read_text())
        return ranks

    def _ffn_bytes(self, layer: int) -> int:
        names = ("ffn_gate", "ffn_up", "ffn_down_t")
        return sum(self._file.tensors[f"blk.{layer}.{name}.weight"].data.nbytes for name in names)

    def _report(self, layer: int, part: float) -> None:
        self._progress(round((layer + 1 + part) * 100), (self._config.n_layers + 1) * 100)


def _as_gguf(model: str | Path, folder: Path) -> Path:
    if not Path(model).is_dir():
        return resolve_gguf(model)
    path = folder / "model.gguf"
    if not path.exists():
        export_gguf(Path(model), path, "q4_0")
    return path


def _check_model(source: Path, config: ModelConfig, replace: bool) -> None:
    if not config.sparse:
        raise UserError(f"{source} is a dense {config.activation} model; predictors are for sparse ones: convert it.")
    if config.experts:
        raise UserError(f"{source} is a mixture of experts; predictors are trained for models with one FFN a layer.")
    if config.predictor is not None and not replace:
        raise UserError(f"{source} has predictors already; drop them with --replace.")


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
