"""The predictors of all layers as one set of parameters, so that a step trains them all at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from turbosparse.predict.fit import rounded, start, whitening


class Stack:
    """fc1 [rank, hidden] and fc2 [ffn, rank] of every layer, padded with zeros to the widest.

    Zeros stay zeros: a unit that puts out nothing hands no gradient to its row (the slope of ReLU at 0 is 0), nor to
    its column. As in `fit`, fc1 is trained in whitened coordinates.

    Attributes:
        ranks: of the layers.
        kinds: the types that fc1 and fc2 will be stored in.
        parameters: float32, rows [layers, widest, hidden] and columns [layers, ffn, widest].
    """

    def __init__(self, ranks: Sequence[int], kinds: tuple[Type, Type], white: Tensor) -> None:
        """White: float32 [layers, hidden, hidden] (fit.whitening)."""
        self.ranks, self.kinds = tuple(ranks), kinds
        self._white = white
        self.parameters: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))

    @classmethod
    def begin(
        cls,
        ranks: Sequence[int],
        kinds: tuple[Type, Type],
        white: Tensor,
        samples: Sequence[tuple[Tensor, Tensor]],
    ) -> Stack:
        """Untrained; samples are x [tokens, hidden] and m [tokens, ffn] of every layer."""
        stack = cls(ranks, kinds, white)
        widest = max(ranks)
        rows, columns = [], []
        for rank, matrix, (x, m) in zip(ranks, white, samples, strict=True):
            first, second = start(x, m, matrix, rank)
            rows.append(torch.cat([first, first.new_zeros(widest - rank, first.shape[1])]))
            columns.append(torch.cat([second, second.new_zeros(len(second), widest - rank)], 1))
        stack.parameters = (torch.stack(rows).requires_grad_(), torch.stack(columns).requires_grad_())
        return stack

    def clone(self) -> Stack:
        """Another with the same values."""
        twin = Stack(self.ranks, self.kinds, self._white)
        rows, columns = (parameter.detach().clone().requires_grad_() for parameter in self.parameters)
        twin.parameters = (rows, columns)
        return twin

    def matrices(self, rounding: bool) -> tuple[Tensor, Tensor]:
        """fc1 [layers, widest, hidden] and fc2 [layers, ffn, widest], as they will be stored or before."""
        rows, columns = self.parameters
        with torch.autocast(rows.device.type, enabled=False):
            fc1, fc2 = rows @ self._white.mT, columns
            return (rounded(fc1, self.kinds[0]), rounded(fc2, self.kinds[1])) if rounding else (fc1, fc2)

    @torch.no_grad()
    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """fc1 [rank, hidden] and fc2 [ffn, rank] of one layer, not rounded."""
        rank = self.ranks[index]
        rows, columns = self.parameters
        return rows[index, :rank] @ self._white[index].T, columns[index, :, :rank].clone()


def whitenings(inputs: Sequence[Tensor]) -> Tensor:
    """Of every layer's inputs, float32 [tokens, hidden]; float32 [layers, hidden, hidden]."""
    return torch.stack([whitening(x) for x in inputs])
