"""What a stage of recovery training minimises.

An objective is called with a batch and the progress of the stage and returns a `Loss`: the scalar to minimise and what
to log. Shapes: B windows, T tokens, D hidden, F neurons.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from turbosparse.relufy.distill import Teacher, mixed_cross_entropy
from turbosparse.relufy.recipes import Sparsity
from turbosparse.relufy.sparsity import SparsityPressure, attach_taps

_TAP_STRIDE = 8  # tokens between those whose activations the penalty looks at


@dataclass
class Loss:
    """`total` has the gradient; `metrics` are detached scalars or vectors, left on the device until they are logged."""

    total: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """One way to train; `model` is the student."""

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], progress: float) -> Loss: ...


def ffns(model: Any) -> list[Any]:
    """The feed-forward blocks of a causal language model, in layer order."""
    return [layer.mlp for layer in model.model.layers]


def last_hidden(model: Any, ids_BT: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Hidden states after the final norm, [B, T, D]; `dtype` is that of the residual stream (None: the weights')."""
    embeddings = model.get_input_embeddings()(ids_BT)
    states: Tensor = model.model(
        inputs_embeds=embeddings if dtype is None else embeddings.to(dtype), use_cache=False
    ).last_hidden_state
    return states


def shifted(hidden_BTD: Tensor, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Pair every hidden state with the token that follows it: [B * (T - 1), D] and [B * (T - 1)]."""
    return hidden_BTD[:, :-1].reshape(-1, hidden_BTD.shape[-1]), ids_BT[:, 1:].reshape(-1)


class Agreement(Protocol):
    """What a model pays where others cannot tell what it will do (predictable.py)."""

    def attach(self) -> None:
        """Watch the model, after all others that watch it."""

    def penalty(self, progress: float, metrics: dict[str, Tensor]) -> Tensor:
        """Of the last forward pass."""


class _SparsityTerm:
    """The penalties and the activation rates that every objective shares."""

    def __init__(self, mlps: list[nn.Module], settings: Sparsity | None) -> None:
        penalty, idle = (settings.penalty, settings.idle) if settings is not None else (None, None)
        self.taps = attach_taps(mlps, penalty, _TAP_STRIDE, idle is not None)
        self.pressure = SparsityPressure(settings) if settings is not None and self.taps else None
        self.idle_pressure = SparsityPressure(idle) if idle is not None and self.taps else None

    def __call__(self, progress: float, metrics: dict[str, Tensor]) -> Tensor | float:
        rates = [tap.rates for tap in self.taps if tap.rates is not None]
        if not rates:
            return 0.0
        mean_rates = torch.stack(rates).mean(0)
        for name, rate in zip(("gate", "up", "h"), mean_rates, strict=True):
            metrics[f"sparsity_{name}"] = 1 - rate
        if self.pressure is None:
            return 0.0
        soft = torch.stack([tap.soft for tap in self.taps if tap.soft is not None]).mean()
        penalty = self.pressure(mean_rates[2], soft, progress)
        if self.idle_pressure is not None:
            soft_idle = torch.stack([tap.soft_idle for tap in self.taps if tap.soft_idle is not None]).mean()
            penalty = penalty + self.idle_pressure(mean_rates[0] - mean_rates[2], soft_idle, progress)
        metrics["penalty"] = penalty.detach()
        return penalty


class NextToken:
    """Cross-entropy on the text, mixed with a teacher's probabilities where one is given, plus the penalties.

    Args:
        shares_S: of the teacher's probabilities in what is learned, 0..1, for each source of text, float32 [sources].
        agreement: one more penalty; None without it.
    """

    def __init__(
        self,
        student: Any,
        sparsity: Sparsity | None,
        teacher: Any = None,
        shares_S: Tensor | None = None,
        dtype: torch.dtype | None = None,
        compiled: bool = False,
        agreement: Agreement | None = None,
    ) -> None:
        self._sparsity, self._agreement = _SparsityTerm(ffns(student), sparsity), agreement
        if agreement is not None:
            agreement.attach()
        self._teacher, self._shares_S = teacher, shares_S
        self._dtype, self._compiled = dtype, compiled

    def _teach(self, ids_BT: Tensor) -> Teacher:
        with torch.no_grad():
            hidden_ND, _ = shifted(last_hidden(self._teacher, ids_BT, self._dtype), ids_BT)
        weight = self._teacher.get_output_embeddings().weight.detach()
        return Teacher(hidden_ND, weight.to(hidden_ND.dtype), softcap_of(self._teacher))

    def _share(self, source_B: Tensor, labels_N: Tensor) -> Tensor | float:
        """Of the teacher in each token [N]: that of the source of its window."""
        if self._shares_S is None:
            return 0.0
        return self._shares_S[source_B].repeat_interleave(labels_N.numel() // source_B.numel())

    def __call__(self, model: Any, batch: dict[str, Tensor], progress: float) -> Loss:
        ids_BT = batch["input_ids"]
        teacher = self._teach(ids_BT) if self._teacher is not None else None
        hidden_ND, labels_N = shifted(last_hidden(model, ids_BT, self._dtype), ids_BT)
        if self._dtype is not None:
            hidden_ND = hidden_ND.to(self._dtype)
        loss, ce_N = mixed_cross_entropy(
            hidden_ND,
            model.get_output_embeddings().weight,
            labels_N,
            softcap_of(model),
            teacher,
            self._share(batch["domain"], labels_N),
            self._compiled,
        )
        metrics = {"ce": ce_N.mean(), "window_ce": ce_N.view(ids_BT.shape[0], -1).mean(-1), "domain": batch["domain"]}
        if teacher is not None:
            metrics["mixed_ce"] = loss.detach()
        loss = loss + self._sparsity(progress, metrics)
        if self._agreement is not None:
            loss = loss + self._agreement.penalty(progress, metrics)
        return Loss(loss, metrics)


class Layerwise:
    """Every sparse FFN learns, on the teacher's hidden states, to give the output of the teacher's FFN.

    The loss is the relative squared error ||y' - y||^2 / ||y||^2, mean over layers: each layer counts the same whatever
    the size of its output. The layers do not see each other's errors, which makes this stage cheap and a start, not an
    end.
    """

    def __init__(self, student: Any, teacher: Any, sparsity: Sparsity | None, dtype: torch.dtype | None = None) -> None:
        self._sparsity = _SparsityTerm(ffns(student), sparsity)
        self._teacher, self._dtype = teacher, dtype
        self._seen: list[tuple[Tensor, Tensor]] = []
        for mlp in ffns(teacher):
            mlp.register_forward_hook(lambda _module, inputs, output: self._seen.append((inputs[0], output)))

    def __call__(self, model: Any, batch: dict[str, Tensor], progress: float) -> Loss:
        self._seen.clear()
        with torch.no_grad():
            last_hidden(self._teacher, batch["input_ids"], self._dtype)
        errors = []
        for mlp, (x_BTD, y_BTD) in zip(ffns(model), self._seen, strict=True):
            difference = mlp(x_BTD).float() - y_BTD.float()
            errors.append(difference.square().sum() / y_BTD.float().square().sum())
        self._seen.clear()
        error = torch.stack(errors).mean()
        metrics = {"relative_error": error.detach()}
        return Loss(error + self._sparsity(progress, metrics), metrics)


def softcap_of(model: Any) -> float | None:
    """Final logit softcap of Gemma 2, None elsewhere."""
    return getattr(model.config, "final_logit_softcapping", None)
