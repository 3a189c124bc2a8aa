"""What the FFNs of a model see and do on a text, layer after layer, in bounded memory.

The residual stream of all windows lies in a file and is carried through one layer at a time; that layer's inputs and
|h| lie in two more, and are overwritten by those of the next. So the memory is that of one layer and a few windows, the
disk that of one layer's tokens, and the text goes through the model once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from turbosparse.model.config import ModelConfig
from turbosparse.model.gguf import GGUFFile
from turbosparse.predict.decoder import Decoder, embed
from turbosparse.predict.fit import Tokens, fit, half
from turbosparse.predict.measure import Curve, curve, edges, low_rank
from turbosparse.predict.sinks import sinks

_WINDOWS = 8  # at once
_QUICK_STEPS = 100
_QUICK_HELD_OUT = 4  # of so many windows, one is measured on


class Collector:
    """Tokens of a model's layers, in order.

    Args:
        file, config: the model.
        windows: token ids, all of one length.
        folder: where the files lie; what is there already from the same windows is gone on with.
        device: where to compute.
    """

    def __init__(
        self,
        file: GGUFFile,
        config: ModelConfig,
        windows: Sequence[list[int]],
        folder: Path,
        device: torch.device,
    ) -> None:
        self._file, self._config, self._folder, self._device = file, config, folder, device
        self._windows = windows
        self._shape = (len(windows), len(windows[0]), config.hidden_size)

    def layer(self, layer: int, progress: Callable[[float], None]) -> Tokens:
        """Carry the stream through a layer; of the one before it, everything must be done."""
        count, length, hidden = self._shape
        if layer == 0:
            self._embed()
        source = np.memmap(self._stream(layer), np.float32, "r", shape=self._shape)
        partial = self._folder / "stream.partial"
        target = np.memmap(partial, np.float32, "w+", shape=self._shape)
        x = np.memmap(self._folder / "x.f16", np.float16, "w+", shape=self._shape)
        mass = np.memmap(self._folder / "mass.f16", np.float16, "w+", shape=(count, length, self._config.ffn_size))
        decoder = Decoder(self._file, self._config, layer, self._device)
        with torch.inference_mode():
            for start in range(0, count, _WINDOWS):
                part = slice(start, start + _WINDOWS)
                stream, fired = decoder(torch.from_numpy(source[part].copy()).to(self._device))
                target[part] = stream.cpu().numpy()
                x[part] = half(fired.x).cpu().numpy()
                mass[part] = half(fired.h.abs()).cpu().numpy()
                progress(min(1.0, (start + _WINDOWS) / count))
        target.flush()
        del target
        os.replace(partial, self._stream(layer + 1))
        return Tokens(x.reshape(-1, hidden), mass.reshape(-1, self._config.ffn_size))

    def finish(self, layer: int) -> None:
        """Drop what was needed to do this layer again."""
        self._stream(layer).unlink(missing_ok=True)

    def _stream(self, layer: int) -> Path:
        return self._folder / f"stream-{layer}.f32"

    def _embed(self) -> None:
        stream = np.memmap(self._stream(0), np.float32, "w+", shape=self._shape)
        for index, window in enumerate(self._windows):
            stream[index] = embed(self._file, self._config, window).numpy()
        stream.flush()


def quick_curves(
    file: GGUFFile,
    config: ModelConfig,
    windows: Sequence[list[int]],
    worth: Sequence[Tensor],
    ranks: Sequence[int],
    device: torch.device,
    progress: Callable[[float], None],
) -> list[list[Curve]]:
    """For each layer, what hasty predictors of some ranks do: fitted on some of the windows, measured on the others."""
    curves = []
    count, length = len(windows), len(windows[0])
    learned = np.repeat(np.arange(count) % _QUICK_HELD_OUT != _QUICK_HELD_OUT - 1, length)
    stream = torch.stack([embed(file, config, window) for window in windows]).to(device)
    for layer in range(config.n_layers):
        with torch.inference_mode():
            stream, fired = Decoder(file, config, layer, device)(stream)
            tokens = Tokens(*(half(seen).flatten(0, 1) for seen in (fired.x, fired.h.abs())))
        always = sinks(tokens.largest(device), worth[layer])
        others = torch.where(always, 0.0, worth[layer])
        seen, new = tokens.where(learned), tokens.where(~learned)
        of_layer = []
        for rank in ranks:
            scores = low_rank(*fit(seen, others, rank, Type.F32, _QUICK_STEPS, layer, device))
            of_layer.append(curve(new, scores, others, edges(new, scores, device)))
        curves.append(of_layer)
        progress((layer + 1) / config.n_layers)
    return curves
