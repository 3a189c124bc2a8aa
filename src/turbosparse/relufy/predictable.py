"""Make the set of neurons that fire predictable: small networks learn it beside the model, which learns to agree.

What a layer's predictor can tell from the FFN's input is limited by its rank, but which neurons fire is the model's to
choose. So while a model trains, a predictor in the form that train-predictors fits (predict/fit.py) trains with it in
every layer, from every few tokens, and the model pays for the share of |h| that its neurons have where the predictor
does not expect them to fire. The model learns nothing from the predictor's own loss, nor the predictor from the
model's. The predictors are thrown away at the end: those that are stored are fitted to the finished model.

Deja Vu (arXiv 2310.17157) fits such predictors to a model as it is; Turbo Sparse (arXiv 2406.05955) trains them during
fine-tuning, without anything that would make the model agree.

Shapes: L layers, B windows, T tokens, N sampled tokens, D hidden, R rank, F neurons of one FFN.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast, reduce
from torch import Tensor, nn
from torch.nn import functional as F

from turbosparse.errors import UserError
from turbosparse.model.config import rank_at
from turbosparse.predict.fit import LARGEST, by_score, start, whitening
from turbosparse.relufy.drelu import SparseGLU
from turbosparse.relufy.objective import ffns
from turbosparse.relufy.observe import observe
from turbosparse.relufy.recipes import Predictability
from turbosparse.relufy.sparsity import ActivationTap

_BETAS = (0.9, 0.98)
_WIDTH = 0.5  # of the step from not selected to selected, in the unit of scores, which are logarithms
_MOVE = 0.5  # of a threshold, in a step, over the logarithm of how many times too many neurons it selects
_FARTHEST_MOVE = 1.0
_START_TOKENS = 8192


def sampled(x_BTF: Tensor, stride: int) -> Tensor:
    """Every stride-th token, [N, ...]; not a window's first, which attention makes a sink unlike all other tokens."""
    first = min((stride + 1) // 2, x_BTF.shape[1] - 1)
    return x_BTF[:, first::stride].flatten(0, 1)


def missed_share(mass_NF: Tensor, score_NF: Tensor, threshold: Tensor) -> Tensor:
    """The share of |h| where the predictor does not expect it, 0..1; the gradient is that by `mass_NF`.

    The step from selected to not is smooth, so that the neurons near the threshold count for about a half. It is a
    share, which a model cannot lower by making all of h smaller, only by moving |h| to where it is expected.
    """
    silent_NF = torch.sigmoid((threshold - score_NF.detach().float()) / _WIDTH)
    return (mass_NF * silent_NF).sum() / (mass_NF.sum() + 1e-9)


class LayerPredictor:
    """The predictor of one FFN, score = fc2 relu(fc1 x); is the FFN's tap, and hears its input by a hook.

    Attributes:
        stride: tokens between those that are looked at.
        fc1, fc2: float32 [R, D] and [F, R]; a neuron is selected where its score reaches `threshold`, a scalar.
        missed: of the last forward pass, the share of |h| that was not expected, with the gradient for the model.
        lesson: of the last forward pass, the gradients of the predictor's own loss by fc1 and fc2, and [2], the shares
            of neurons that it selects and that fire.
    """

    def __init__(self, fc1: Tensor, fc2: Tensor, threshold: Tensor, stride: int) -> None:
        self.fc1, self.fc2, self.threshold, self.stride = fc1, fc2, threshold, stride
        self.missed: Tensor | None = None
        self.lesson: tuple[Tensor, Tensor, Tensor] | None = None
        self._x_ND: Tensor | None = None

    def attach(self, mlp: Any) -> None:
        """Hear and see this FFN; the tap that it has is called first."""
        self._statistics: ActivationTap = mlp.tap
        mlp.register_forward_pre_hook(self._hear)
        mlp.tap = self

    def _hear(self, _mlp: nn.Module, inputs: tuple[Tensor]) -> None:
        self._x_ND = sampled(inputs[0].detach(), self.stride)

    def scores(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the input last heard, without gradient: x [N, D], relu(fc1 x) [N, R] and the scores [N, F]."""
        assert self._x_ND is not None
        x_ND, self._x_ND = self._x_ND, None
        with torch.no_grad():
            z_NR = torch.relu(F.linear(x_ND, self.fc1))
            return x_ND, z_NR, F.linear(z_NR, self.fc2)

    def __call__(self, gate_BTF: Tensor, up_BTF: Tensor, h_BTF: Tensor) -> None:
        self._statistics(gate_BTF, up_BTF, h_BTF)
        h_NF = sampled(h_BTF, self.stride).float()
        # Of dReLU, h is |h| as it is, and abs() would take the slope from silent neurons that have one (slopes.py).
        mass_NF = h_NF.abs() if self._statistics.gate_only else h_NF
        x_ND, z_NR, score_NF = self.scores()
        self.missed = missed_share(mass_NF, score_NF, self.threshold)
        with torch.no_grad():
            self.lesson = self._learn(x_ND, z_NR, score_NF.float(), mass_NF.detach())

    def _learn(self, x_ND: Tensor, z_NR: Tensor, score_NF: Tensor, mass_NF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the loss of predict/fit.py, where a neuron's worth is its |h|."""
        m_NF = (mass_NF / (mass_NF.mean() + 1e-12)).clamp_max(LARGEST)
        by_score_NF = by_score(score_NF, m_NF).div_(len(x_ND)).to(z_NR.dtype)
        by_z_NR = (by_score_NF @ self.fc2.to(z_NR.dtype)) * (z_NR > 0)
        shares = torch.stack([(score_NF >= self.threshold).float().mean(), (mass_NF > 0).float().mean()])
        return (by_z_NR.T @ x_ND.to(z_NR.dtype)).float(), (by_score_NF.T @ z_NR).float(), shares


class Predictors:
    """The predictors of all layers, their optimiser, and what the model pays for not agreeing with them.

    Args:
        model: a sparse model.
        settings: of the stage.

    Raises:
        UserError: the model is dense.
    """

    def __init__(self, model: Any, settings: Predictability) -> None:
        self._settings, self._model = settings, model
        blocks = ffns(model)
        if not all(isinstance(mlp, SparseGLU) for mlp in blocks):
            raise UserError("`predictability` is for sparse models; convert the model first, or leave it out")
        hidden, neurons = blocks[0].down_proj.weight.shape
        per_up = 2 if blocks[0].mirrored_ups else 1
        self.rank = rank_for(settings.share, hidden, neurons, blocks[0].neurons_per_gate, per_up)
        device, layers = blocks[0].up_proj.weight.device, len(blocks)
        self._white = torch.zeros(layers, hidden, hidden, device=device)
        self._rows = [torch.zeros(self.rank, hidden, device=device) for _ in blocks]
        self._columns = [torch.zeros(neurons, self.rank, device=device) for _ in blocks]
        self._thresholds = torch.zeros(layers, device=device)
        self._optimizer = torch.optim.Adam([*self._rows, *self._columns], betas=_BETAS, foreach=True)
        self._sums: list[Tensor] | None = None  # of the gradients and shares of the micro-batches of a step
        self._batches = 0
        self.layers = [
            LayerPredictor(rows, columns, threshold, settings.stride)
            for rows, columns, threshold in zip(self._rows, self._columns, self._thresholds.unbind(), strict=True)
        ]

    def attach(self) -> None:
        """Watch the model's FFNs, which have taps of sparsity.attach_taps, from the next forward pass on."""
        for layer, mlp in zip(self.layers, ffns(self._model), strict=True):
            layer.attach(mlp)

    @torch.no_grad()
    def begin(self, batches: Iterable[Tensor], seed: int, dtype: torch.dtype | None = None) -> None:
        """Start from what the model does now.

        Args:
            batches: int64 [B, T] token ids; some ten thousand tokens are enough.
            seed: of the directions that the predictors look at first.
            dtype: of the residual stream, as in last_hidden.
        """
        seen = _watch(self._model, batches, dtype, self._settings.stride)
        with torch.autocast(self._white.device.type, enabled=False):  # decompositions want float32
            self._start(seen, seed)
        for tensor in (self._white, *self._rows, *self._columns):
            tensor.copy_(broadcast(tensor))  # processes must not drift apart
        self._hand_out()

    def _start(self, seen: Sequence[tuple[Tensor, Tensor]], seed: int) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for index, (x_ND, mass_NF) in enumerate(seen):
                self._white[index] = whitening(x_ND)
                m_NF = (mass_NF / (mass_NF.mean() + 1e-12)).clamp_max(LARGEST)
                rows, columns = start(x_ND, m_NF, self._white[index], self.rank)
                self._rows[index].copy_(rows)
                self._columns[index].copy_(columns)

    def _hand_out(self) -> None:
        """Give the layers what the parameters are now."""
        with torch.autocast(self._white.device.type, enabled=False):  # so that the model's graph meets one dtype
            for layer, rows, columns, white, threshold in zip(
                self.layers, self._rows, self._columns, self._white, self._thresholds.unbind(), strict=True
            ):
                layer.fc1, layer.fc2, layer.threshold = rows @ white.T, columns, threshold

    def penalty(self, progress: float, metrics: dict[str, Tensor]) -> Tensor:
        """What the last forward pass adds to the loss, scalar; keeps what the predictors learn from it."""
        missed, lessons = [], []
        for layer in self.layers:
            assert layer.missed is not None and layer.lesson is not None
            missed.append(layer.missed)
            lessons.append(layer.lesson)
            layer.missed, layer.lesson = None, None
        by_fc1, by_fc2, shares = (list(part) for part in zip(*lessons, strict=True))
        fresh = [*by_fc1, *by_fc2, torch.stack(shares)]
        if self._sums is None:
            self._sums = fresh
        else:
            torch._foreach_add_(self._sums, fresh)
        self._batches += 1
        mean = torch.stack(missed).mean()
        metrics["missed"] = mean.detach()
        s = self._settings
        return s.weight * (min(1.0, progress / s.ramp) if s.ramp > 0 else 1.0) * mean

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Let the predictors learn from the micro-batches since the last step, of all processes, which all call this.

        Args:
            rate: of learning, over its peak, 0..1.
        """
        assert self._sums is not None
        sums = [reduce(total, "mean") / self._batches for total in self._sums]
        self._sums, self._batches = None, 0
        layers = len(self.layers)
        for rows, white, gradient in zip(self._rows, self._white, sums[:layers], strict=True):
            rows.grad = gradient @ white  # fc1 is trained in whitened coordinates
        for columns, gradient in zip(self._columns, sums[layers:-1], strict=True):
            columns.grad = gradient
        self._optimizer.param_groups[0]["lr"] = self._settings.learning_rate * rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        selected, fires = sums[-1].clamp_min(1e-4).unbind(1)
        move = _MOVE * (selected / (self._settings.selected * fires)).log()
        self._thresholds = self._thresholds + move.clamp(-_FARTHEST_MOVE, _FARTHEST_MOVE)
        self._hand_out()

    def save(self, path: Path) -> None:
        """Write all that going on needs; between steps."""
        torch.save(
            {
                "white": self._white,
                "rows": self._rows,
                "columns": self._columns,
                "thresholds": self._thresholds,
                "optimizer": self._optimizer.state_dict(),
            },
            path,
        )

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Go on from what `save` wrote."""
        saved = torch.load(path, map_location=self._white.device, weights_only=True)
        self._white.copy_(saved["white"])
        self._thresholds = saved["thresholds"]
        for mine, theirs in ((self._rows, saved["rows"]), (self._columns, saved["columns"])):
            for tensor, value in zip(mine, theirs, strict=True):
                tensor.copy_(value)
        self._optimizer.load_state_dict(saved["optimizer"])
        self._hand_out()


def rank_for(share: float, hidden: int, neurons: int, per_gate: int = 1, per_up: int = 1) -> int:
    """The rank at which a predictor has `share` of the weights of its dense FFN; at least 1."""
    return max(1, int(rank_at(share, hidden, neurons, per_gate, per_up)))


class _Watch:
    """Tap that keeps the input and |h| of some tokens."""

    def __init__(self, mlp: Any, stride: int) -> None:
        self._stride = stride
        self.x_ND: list[Tensor] = []
        self.mass_NF: list[Tensor] = []
        self.handle = mlp.register_forward_pre_hook(self._hear)

    def _hear(self, _mlp: nn.Module, inputs: tuple[Tensor]) -> None:
        self.x_ND.append(sampled(inputs[0], self._stride).float())

    def __call__(self, gate_BTF: Tensor, up_BTF: Tensor, h_BTF: Tensor) -> None:
        self.mass_NF.append(sampled(h_BTF, self._stride).float().abs())


def _watch(
    model: Any, batches: Iterable[Tensor], dtype: torch.dtype | None, stride: int
) -> Sequence[tuple[Tensor, Tensor]]:
    """X [N, D] and |h| [N, F] of every layer."""
    watches = [_Watch(mlp, stride) for mlp in ffns(model)]
    try:
        observe(model, watches, batches, dtype)
    finally:
        for watch in watches:
            watch.handle.remove()
    return [(torch.cat(watch.x_ND)[:_START_TOKENS], torch.cat(watch.mass_NF)[:_START_TOKENS]) for watch in watches]
