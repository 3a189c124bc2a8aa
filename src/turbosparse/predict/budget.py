"""What predictors are stored as, and how many bytes they may take."""

from __future__ import annotations

from gguf import GGMLQuantizationType as Type

from turbosparse.errors import UserError
from turbosparse.model.config import ModelConfig
from turbosparse.model.gguf import GGUFFile, row_bytes
from turbosparse.model.quantize import WRITABLE, writable_type
from turbosparse.predict.ranks import BLOCK


def kinds_of(file: GGUFFile, config: ModelConfig) -> tuple[Type, Type]:
    """The types of fc1 and fc2: those of the FFNs."""
    gate = file.tensors["blk.0.ffn_gate.weight"].type
    kind = gate if gate in WRITABLE else Type.Q8_0
    return writable_type(kind, config.hidden_size), kind


def ffn_bytes(file: GGUFFile, layer: int) -> int:
    """Of one layer's dense FFN."""
    names = ("ffn_gate", "ffn_up", "ffn_down_t")
    return sum(file.tensors[f"blk.{layer}.{name}.weight"].data.nbytes for name in names)


def affordable(file: GGUFFile, config: ModelConfig, kinds: tuple[Type, Type], share: float) -> int:
    """How many blocks of rows fc1 may have in all layers together.

    Raises:
        UserError: not even one a layer.
    """
    layers = config.n_layers
    whole = sum(ffn_bytes(file, layer) for layer in range(layers))
    block = BLOCK * row_bytes(kinds[0], config.hidden_size) + config.ffn_size * row_bytes(kinds[1], BLOCK)
    blocks = int(share * whole / block)
    if blocks < layers:
        raise UserError(f"--share {share:g}: the narrowest predictors take {layers * block / whole:.3f}; give more.")
    return blocks
