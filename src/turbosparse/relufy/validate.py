"""Validation during training: loss and sparsity of every domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from turbosparse.relufy.distill import token_cross_entropy
from turbosparse.relufy.objective import ffns, last_hidden, shifted, softcap_of
from turbosparse.relufy.predictable import LayerPredictor
from turbosparse.relufy.selection import SelectionTap
from turbosparse.relufy.sparsity import attach_taps

_WINDOWS_PER_PASS = 32


@torch.no_grad()
def validate(
    model: Any,
    windows: Mapping[str, Tensor],
    device: torch.device,
    dtype: torch.dtype | None,
    predictors: Sequence[LayerPredictor] | None = None,
) -> dict[str, dict[str, float]]:
    """Mean cross-entropy (nats per token) and sparsity (0..1) of each domain.

    Args:
        windows: int64 [windows, context] per domain.
        dtype: of autocast and of the residual stream; None computes in the weights' own.
        predictors: of all layers, attached to the model; to tell how many neurons they select for 98 % of |h|.

    Returns:
        {domain: {"ce", and for a sparse model "sparsity_gate", "sparsity_up", "sparsity_h", "min_layer_sparsity_h";
        with predictors "selected_98" and "max_layer_selected_98": neurons selected over neurons that fire where each
        layer keeps 98 % of its |h|, mean and most of all layers}}.
    """
    was_training = model.training
    model.eval()
    mlps = ffns(model)
    old_taps = [getattr(mlp, "tap", None) for mlp in mlps]
    taps = attach_taps(mlps)
    results: dict[str, dict[str, float]] = {}
    for domain, ids in windows.items():
        selections = [SelectionTap(*pair) for pair in zip(predictors, taps, strict=True)] if predictors else []
        for mlp, selection in zip(mlps, selections, strict=bool(selections)):
            mlp.tap = selection
        total, rates = torch.zeros((), device=device), torch.zeros((len(taps), 3), device=device)
        for batch in ids.split(_WINDOWS_PER_PASS):
            ids_BT = batch.to(device)
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                hidden_ND, labels_N = shifted(last_hidden(model, ids_BT, dtype), ids_BT)
                weight = model.get_output_embeddings().weight
                total += token_cross_entropy(hidden_ND, weight, labels_N, softcap_of(model)).sum()
            if taps:
                rates += len(batch) * torch.stack([tap.rates for tap in taps if tap.rates is not None])
        results[domain] = {"ce": total.item() / (ids.shape[0] * (ids.shape[1] - 1))}
        if taps:
            sparsity = 1 - rates / len(ids)
            gate, up, h = sparsity.mean(0).tolist()
            results[domain] |= {"sparsity_gate": gate, "sparsity_up": up, "sparsity_h": h}
            results[domain]["min_layer_sparsity_h"] = sparsity[:, 2].min().item()
        if selections:
            selected = torch.stack([selection.selected(0.98) for selection in selections])
            results[domain] |= {"selected_98": selected.mean().item(), "max_layer_selected_98": selected.max().item()}
    for mlp, tap in zip(mlps, old_taps, strict=True):
        if taps:
            mlp.tap = tap
    model.train(was_training)
    return results


def mean_over_domains(results: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Every figure averaged over the domains, each counting the same."""
    keys = next(iter(results.values())).keys()
    return {key: sum(result[key] for result in results.values()) / len(results) for key in keys}
