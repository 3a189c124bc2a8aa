"""Gates that are their own predictors.

A predictor is worth its bytes where it is cheaper than the gates that it saves. Gates of three values a row
(relufy/ternary.py) are cheap themselves, and no guess: exact mode reads them all, and what is left to predict is which
of the open ones matter. The smallest of them hold little of |h|, so a threshold on the gate says that, for no bytes.
"""

from __future__ import annotations

import numpy as np

from turbosparse.model.config import ModelConfig
from turbosparse.model.gguf import GGUFFile
from turbosparse.model.quantize import dequantize_rows, row_chunks


def gates_are_ternary(file: GGUFFile, config: ModelConfig) -> bool:
    """Whether every row of every gate holds -s, 0 and s alone, for an s of its own."""
    for layer in range(config.n_layers):
        tensor = file.tensors.get(f"blk.{layer}.ffn_gate.weight")
        if tensor is None:  # of experts
            return False
        for start, stop in row_chunks(*tensor.shape):
            size = np.abs(dequantize_rows(tensor, start, stop))
            if ((size != 0) & (size != size.max(axis=1, keepdims=True))).any():
                return False
    return True
