"""What a file of PowerInfer is: a GGUF with another magic, llama.cpp's keys of 2023 and predictors without keys.

`blk.N.fc1` and `blk.N.fc2` are the predictor of a layer, which reads the residual stream; one threshold holds for all
layers. What activation the file has follows from the architecture alone.

Source: llama.cpp, ggml.c and convert.py of https://github.com/SJTU-IPADS/PowerInfer (July 2025).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from turbosparse.model.config import Predictor
from turbosparse.model.config_values import WIDTH
from turbosparse.model.families import FAMILIES, Family
from turbosparse.model.fields import Bounds, Fields
from turbosparse.model.gguf import GGUFFile

THRESHOLD_KEY = "powerinfer.sparse_threshold"
DEFAULT_THRESHOLD = 0.0
# Family and activation of the architectures that are read; the others (OPT, Falcon) have no gate.
ARCHITECTURES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {"bamboo": ("mistral", "drelu"), "llama": ("llama", "reglu")}
)
_THRESHOLD: Bounds = (-1e6, 1e6)


def identity(fields: Fields, architecture: str) -> tuple[Family, str]:
    """Family and activation of a file.

    Raises:
        UserError: an architecture that is not read.
    """
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        fields.fail(f"the architecture {architecture[:60]!r} of a PowerInfer file is not supported; {known} are")
    family, activation = ARCHITECTURES[architecture]
    return FAMILIES[family], activation


def predictor(file: GGUFFile, n_layers: int) -> Predictor:
    """The predictors of a file, whose widths only its tensors tell.

    Raises:
        UserError: a layer has none, or its width or the threshold is impossible.
    """
    fields = Fields(str(file.path), file.metadata)
    threshold = fields.number(THRESHOLD_KEY, _THRESHOLD, DEFAULT_THRESHOLD)
    ranks = []
    for layer in range(n_layers):
        fc1 = file.tensors.get(f"blk.{layer}.fc1.weight")
        if fc1 is None or len(fc1.shape) != 2 or fc1.shape[0] > WIDTH[1]:
            fields.fail(f"it has no predictor blk.{layer}.fc1.weight of two dimensions and a possible width")
        ranks.append(fc1.shape[0])
    return Predictor(tuple(ranks), (threshold,) * n_layers, "residual")
