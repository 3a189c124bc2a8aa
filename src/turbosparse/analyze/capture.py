"""Count firings: in the engine, which counts by itself, or in a Hugging Face model, through hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from turbosparse.analyze.statistics import Prediction, SparsityReport, summarise
from turbosparse.errors import UserError
from turbosparse.folders import PlainTokenizer, load_folder

if TYPE_CHECKING:
    from turbosparse.engine import Engine

Progress = Callable[[int], None]


def capture_engine(
    engine: Engine, token_windows: Iterable[Sequence[int]], progress: Progress | None = None
) -> SparsityReport:
    """Run windows of tokens densely, so that every gate and every up is computed, and report what fired."""
    engine.count_activations(True)
    try:
        done = 0
        for window in token_windows:
            session = engine.session(len(window))
            session.prefill(window, "dense")
            done += len(window)
            if progress is not None:
                progress(done)
        counts = engine.counters()
    finally:
        engine.count_activations(False)
    prediction = None
    if counts.selected is not None and counts.hit is not None and counts.mass is not None and counts.missed is not None:
        prediction = Prediction(counts.selected, counts.hit, counts.mass, counts.missed)
    return summarise(counts.tokens, counts.gate, counts.up, counts.h, prediction, counts.routed)


def capture_hf(folder: Path, data: Path, limit: int | None = None, progress: Progress | None = None) -> SparsityReport:
    """The same for a Hugging Face folder, sparse or dense, in fp32.

    Raises:
        UserError: torch is missing, or the folder is no model with gated FFNs.
    """
    from turbosparse.evaluate.windows import windows

    tokenizer, model = load_folder(folder)
    import torch

    try:
        counters = [_LayerCounter(layer.mlp) for layer in model.model.layers]
    except AttributeError as error:
        raise UserError(f"{folder} is no model with gated FFNs ({error}).") from None
    tokens = 0
    with torch.inference_mode():
        for window in windows(PlainTokenizer(tokenizer), data, limit=limit):
            model.model(torch.tensor([window], device=model.device), use_cache=False)
            tokens += len(window)
            if progress is not None:
                progress(tokens)
    gate, up, h = (_stacked(counters, name) for name in ("gate", "up", "h"))
    return summarise(tokens, gate, up, h)


def _stacked(counters: Sequence[_LayerCounter], name: str) -> npt.NDArray[np.int64]:
    return np.stack([getattr(counter, name).cpu().numpy() for counter in counters])


class _LayerCounter:
    """Counts one FFN's firings, sparse or dense, by hooks: on what gate and up give, and what down is given."""

    def __init__(self, mlp: Any) -> None:
        import torch

        neurons, device = mlp.down_proj.in_features, mlp.up_proj.weight.device
        group = neurons // mlp.gate_proj.out_features  # neurons of one gate, which stand next to each other
        mirrored = mlp.up_proj.out_features < neurons  # a row serves two neurons, the second one with the other sign
        self.gate, self.up, self.h = (torch.zeros(neurons, dtype=torch.int64, device=device) for _ in range(3))
        mlp.gate_proj.register_forward_hook(
            lambda _module, _inputs, output: self._add(self.gate, (output > 0).repeat_interleave(group, -1))
        )
        mlp.up_proj.register_forward_hook(
            lambda _module, _inputs, output: self._add(
                self.up, torch.stack([output > 0, output < 0], -1).flatten(-2) if mirrored else output > 0
            )
        )
        mlp.down_proj.register_forward_pre_hook(lambda _module, inputs: self._add(self.h, inputs[0] != 0))

    @staticmethod
    def _add(total: Any, fires: Any) -> None:
        total += fires.reshape(-1, fires.shape[-1]).sum(0)
