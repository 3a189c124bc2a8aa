"""Which of many thresholds scores reach, for some hundred million scores."""

from __future__ import annotations

import torch
from torch import Tensor

_CELLS = 1 << 18  # far more than thresholds, so that few cells have one; a table of a megabyte stays in the cache
_NARROWEST = 1e-30  # a range of thresholds that are all one


class Bins:
    """What `torch.bucketize(scores, borders, right=True)` gives, on a CPU several times as fast.

    A search among thousands of borders takes a dozen guesses of which half are wrong. So the range of the borders is
    cut into cells of one width, and a table knows how many borders lie below each. Borders and scores go to cells by
    the same arithmetic, which never turns their order around: only a score in a cell that has a border is searched for.

    Args:
        borders: float32 [borders], ascending.
    """

    def __init__(self, borders: Tensor) -> None:
        self._borders = borders
        self._lowest = borders[0]
        self._scale = (_CELLS - 1) / (borders[-1] - borders[0]).clamp_min(_NARROWEST)
        inside = torch.bincount(self._cells(borders), minlength=_CELLS)
        self._below = (inside.cumsum(0) - inside).int()
        self._has_border = inside > 0

    def of(self, scores: Tensor) -> Tensor:
        """How many borders each of some scores, float32 [scores], reaches."""
        if scores.device.type != "cpu":  # where many guesses are made at once, and a table is slower
            return torch.bucketize(scores, self._borders, right=True)
        cells = self._cells(scores)
        found = self._below.index_select(0, cells)
        near = self._has_border.index_select(0, cells).nonzero()[:, 0]
        found[near] = torch.bucketize(scores.index_select(0, near), self._borders, out_int32=True, right=True)
        return found

    def _cells(self, scores: Tensor) -> Tensor:
        return ((scores - self._lowest) * self._scale).clamp_(0, _CELLS - 1).int()
