"""Tiny random folders laid out as published sparse models are: their config.json's keys, their tensors' names.

What each layout is known from stands in docs/format.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from factories import make_folder
from folders import edit_weights

RANK = 32
# Keys of config.json beyond those of the family, None where the layout has none; and the family that tensors are of.
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bamboo": (
        "mistral",
        {
            "architectures": ["BambooForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_bamboo.BambooConfig",
                "AutoModel": "modeling_bamboo.BambooForCausalLM",
                "AutoModelForCausalLM": "modeling_bamboo.BambooForCausalLM",
            },
            "model_type": "bamboo",
            "hidden_act": "relu",
            "sliding_window": 4096,
        },
    ),
    "turbosparse-mixtral": (
        "mixtral",
        {
            "architectures": ["TurboSparseMixtralForCausalLM"],
            "model_type": "turbosparsemixtral",
            "hidden_act": "relu",
        },
    ),
    "relullama": ("llama", {"architectures": ["LlamaForCausalLM"], "hidden_act": "relu"}),
    "prosparse": (
        "llama",
        {
            "architectures": ["SparseLlamaForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_sparsellama.SparseLlamaConfig",
                "AutoModelForCausalLM": "modeling_sparsellama.SparseLlamaForCausalLM",
            },
            "model_type": "sparsellama",
            "hidden_act": "fatrelu",
            "hidden_act_param": 0.1,
        },
    ),
}


def published_folder(folder: Path, layout: str, predictors: bool = False, ffn: int = 96, **changes: Any) -> Path:
    """Write a folder; with `predictors`, those of TurboSparse: `predictor.fc1` and `fc2` in every FFN or expert.

    Beside the weights lies code that must not be run: it makes a file named "ran".
    """
    family, keys = LAYOUTS[layout]
    make_folder(folder, family, intermediate_size=ffn)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | keys | changes))
    for name in ("modeling_bamboo.py", "configuration_bamboo.py", "modeling_sparsellama.py"):
        (folder / name).write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    if predictors:
        edit_weights(folder, _add_predictors)
    return folder


def _add_predictors(weights: dict[str, np.ndarray]) -> None:
    rng = np.random.default_rng(5)
    for name in list(weights):
        block, _, part = name.removesuffix(".weight").rpartition(".")
        if part in ("up_proj", "w3"):
            rows, columns = weights[name].shape
            fc1, fc2 = rng.standard_normal((RANK, columns)) / 8, rng.standard_normal((rows, RANK)) / 6
            weights[f"{block}.predictor.fc1.weight"] = fc1.astype(np.float32)
            weights[f"{block}.predictor.fc2.weight"] = fc2.astype(np.float32)
