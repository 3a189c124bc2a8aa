"""Scores are put into the bins that a search puts them into, whatever the borders."""

import pytest
import torch

from turbosparse.predict.bins import Bins

DRAW = torch.Generator().manual_seed(0)
NORMAL = torch.randn(100_000, generator=DRAW)
BORDERS = {
    "quantiles": NORMAL.sort().values[:: len(NORMAL) // 4096].unique(),
    "one": torch.tensor([0.25]),
    "two neighbours": torch.tensor([0.25, torch.nextafter(torch.tensor(0.25), torch.tensor(1.0)).item()]),
    "many in a cell": torch.cat([torch.tensor([-1e6]), NORMAL.sort().values[::100].unique(), torch.tensor([1e6])]),
    "zeros of both signs": torch.tensor([-1.0, -0.0, 1.0]),
    "the smallest": torch.tensor([0.0, 1e-45, 2e-45]),
}


@pytest.mark.parametrize("name", BORDERS)
def test_bins_are_those_of_a_search(name):
    borders = BORDERS[name]
    above, below = (torch.nextafter(borders, torch.tensor(far)) for far in (torch.inf, -torch.inf))
    scores = torch.cat([borders, above, below, NORMAL, torch.tensor([0.0, -0.0, 1e30, -1e30])])
    assert torch.equal(Bins(borders).of(scores).long(), torch.bucketize(scores, borders, right=True))


def test_no_scores_have_no_bins():
    assert len(Bins(BORDERS["quantiles"]).of(torch.empty(0))) == 0
