"""Copies of Hugging Face folders with something changed in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file


def copy_folder(source: Path, target: Path) -> Path:
    """Copy the files of `source` into the new folder `target`; return that."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def edit_config(folder: Path, **changes: Any) -> None:
    """Set keys of its config.json."""
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Let `change` alter the tensors, name to array, of its one weight file."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
