"""Sparse Hugging Face folders that others published: what their config.json and tensors say beyond a family's own.

No code of such a folder is ever run: `auto_map` and the Python files beside the weights are not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from turbosparse.errors import UserError
from turbosparse.model.checkpoint import Checkpoint, StoredTensor
from turbosparse.model.config import ModelConfig, Predictor
from turbosparse.model.config_values import THRESHOLD, WIDTH
from turbosparse.model.families import FAMILIES, Family
from turbosparse.model.fields import Fields

# Their model types, and the family whose tensors and keys they have.
_FAMILIES = {"bamboo": "mistral", "turbosparsemixtral": "mixtral", "sparsellama": "llama"}
BY_TYPE: Mapping[str, Family] = MappingProxyType({kind: FAMILIES[name] for kind, name in _FAMILIES.items()})
_DEFAULT_THRESHOLD = 0.0  # that of PowerInfer; the folders state none


def published_activation(fields: Fields, model_type: str) -> tuple[str, float]:
    """Activation and `ModelConfig.gate_threshold` of a config.json of one of these types.

    Raises:
        UserError: an activation that is neither ReLU nor FATReLU.
    """
    name = fields.text("hidden_act")
    if model_type != "sparsellama":
        if name != "relu":  # of gate and up alike
            fields.fail(f"hidden_act of a {model_type} model is {name[:60]!r}, not relu")
        return "drelu", 0.0
    if name == "fatrelu":
        return "reglu", fields.number("hidden_act_param", THRESHOLD)
    if name != "relu":
        fields.fail(f"hidden_act of a {model_type} model is {name[:60]!r}, not relu or fatrelu")
    return "reglu", 0.0


def stored_predictor(
    checkpoint: Checkpoint, config: ModelConfig, prefix: str, threshold: float | None
) -> Predictor | None:
    """The predictors in a folder: `predictor.fc1` and `predictor.fc2` beside the matrices of a layer's FFN or expert.

    They read the residual stream before the FFN's norm.

    Args:
        checkpoint: the folder; the tensors' shapes are checked later, against the widths found here.
        config: of its model.
        prefix: of the text model's tensors.
        threshold: of all scores, which no such folder states; None: 0.

    Raises:
        UserError: a width that cannot be.
    """
    names = FAMILIES[config.family].experts
    block = "mlp" if names is None else f"{names.block}.experts.0"
    ranks = [
        _rank(checkpoint.tensors.get(f"{prefix}layers.{layer}.{block}.predictor.fc1.weight"))
        for layer in range(config.n_layers)
    ]
    if max(ranks) == 0:
        return None
    value = _DEFAULT_THRESHOLD if threshold is None else threshold
    return Predictor(tuple(ranks), (value,) * (config.n_layers * config.ffns), "residual")


def _rank(fc1: StoredTensor | None) -> int:
    if fc1 is None:
        return 0
    if len(fc1.shape) != 2 or not 1 <= fc1.shape[0] <= WIDTH[1]:
        raise UserError(f"{fc1.file}: tensor {fc1.name!r} has the shape {fc1.shape}, which is not that of a predictor.")
    return fc1.shape[0]
