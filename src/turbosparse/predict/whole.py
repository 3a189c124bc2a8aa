"""A sparse model held in torch as a whole, frozen: for what needs its output, or all its layers at once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from turbosparse.model.config import ModelConfig
from turbosparse.model.gguf import GGUFFile
from turbosparse.model.layout import EMBEDDING
from turbosparse.predict.decoder import Decoder, logits, tensor_of
from turbosparse.predict.fit import Tokens, half

Change = Callable[[int, Tensor, Tensor], Tensor]


class Whole:
    """All layers, the embedding and the head, float32 on one device.

    Args:
        file, config: the model.
        device: where to hold it and compute.
    """

    def __init__(self, file: GGUFFile, config: ModelConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self._table = tensor_of(file, EMBEDDING, device)
        self._layers = [Decoder(file, config, layer, device) for layer in range(config.n_layers)]
        self.logits = logits(file, config, device)

    def __call__(self, tokens: Tensor, change: Change | None = None) -> Tensor:
        """The stream after the last layer, float32 [windows, length, hidden].

        Args:
            tokens: int64 [windows, length].
            change: what to go on with instead of a layer's h, from the layer, its FFN's input and h.
        """
        stream = functional.embedding(tokens.to(self.device), self._table) * self.config.embedding_scale
        for index, layer in enumerate(self._layers):
            stream, _ = layer(stream, None if change is None else partial(change, index))
        return stream

    @torch.no_grad()
    def watch(self, tokens: Tensor) -> list[Tokens]:
        """What the layers' FFNs see and do, token after token, on the device."""
        seen: list[Tokens] = []

        def note(layer: int, x: Tensor, h: Tensor) -> Tensor:
            seen.append(Tokens(half(x).flatten(0, 1), half(h.abs()).flatten(0, 1)))
            return h

        self(tokens, note)
        return seen


def fast(device: torch.device) -> AbstractContextManager[object]:
    """Products in bfloat16 where that is faster; for what is learned from, not for what is measured."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
