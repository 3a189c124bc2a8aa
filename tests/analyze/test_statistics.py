"""Counts to figures, by hand; and the chart's bars."""

import numpy as np
import pytest

from turbosparse.analyze import summarise
from turbosparse.analyze.report import bar, chart
from turbosparse.analyze.statistics import Missed, Prediction


def test_shares_and_kinds_of_neurons():
    gate = np.array([[200, 100, 0, 0]])
    up = np.array([[200, 200, 200, 0]])
    h = np.array([[200, 1, 0, 101]])
    report = summarise(200, gate, up, h)
    layer = report.layers[0]
    assert layer.h == pytest.approx(1 - 302 / 800) and layer.gate == pytest.approx(1 - 300 / 800)
    assert layer.up == pytest.approx(0.25)
    assert (layer.hot, layer.cold, layer.never) == (2, 1, 1)  # 1 of 200 is under 1 %, 101 is over half
    assert report.to_json()["sparsity"]["h"] == layer.h and report.neurons == 4


def test_the_mean_is_over_layers():
    counts = np.array([[10, 10], [0, 0]])
    report = summarise(10, counts, counts, counts)
    assert [layer.h for layer in report.layers] == [0.0, 1.0] and report.mean("h") == 0.5


def test_selection_and_recall():
    h = np.array([[10, 0, 5, 5], [10, 0, 0, 0], [0, 0, 0, 0]])
    selected = np.array([[10, 10, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]])
    hit = np.array([[10, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    mass = np.array([[4.0, 0, 2, 2], [1, 0, 0, 0], [0, 0, 0, 0]])
    missed = np.array([[0.0, 0, 1, 2], [1, 0, 0, 0], [0, 0, 0, 0]])
    report = summarise(10, h, h, h, Prediction(selected, hit, mass, missed))
    layer, without, silent = report.layers
    assert (layer.selected, layer.recall) == (0.5, 0.5)
    assert (without.selected, without.recall) == (None, None)  # no predictor there
    assert (silent.selected, silent.recall) == (0.025, None)
    assert (layer.missed, without.missed, silent.missed) == (0.375, None, None)
    assert report.to_json()["predictor"] == {"selected": 0.5, "recall": 0.5, "missed": 0.375}
    assert summarise(10, h, h, h).to_json()["predictor"] is None


def test_the_neurons_most_often_missed_are_named():
    h = np.array([[10, 0, 5, 6, 9, 4, 3, 1]])
    hit = np.array([[10, 0, 0, 0, 6, 4, 2, 0]])
    report = summarise(10, h, h, h, Prediction(hit, hit, h * 1.0, (h - hit) * 1.0))
    assert report.layers[0].most_missed == (
        Missed(3, 6, 1.0),
        Missed(2, 5, 1.0),
        Missed(4, 3, 3 / 9),
        Missed(6, 1, 1 / 3),
        Missed(7, 1, 1.0),
    )
    assert report.to_json()["layers"][0]["most_missed"][0] == {"neuron": 3, "tokens": 6, "share": 1.0}
    cells = [list(column.cells) for column in chart(report).columns]
    assert cells[-1] == ["3 2 4", ""] and cells[-2][0] == "42.1%"


def test_experts_are_measured_on_the_tokens_that_they_computed():
    routed = np.array([[8, 2, 0]])
    h = np.array([[[8, 0], [2, 1], [0, 0]]])
    report = summarise(10, h, h, h, routed=routed)
    assert [(layer.layer, layer.expert, layer.routed) for layer in report.layers] == [
        (0, 0, 0.8),
        (0, 1, 0.2),
        (0, 2, 0),
    ]
    assert [layer.h for layer in report.layers] == [0.5, 0.25, 1.0]
    assert [(layer.hot, layer.never) for layer in report.layers] == [(1, 1), (1, 0), (0, 2)]
    assert report.mean("h") == pytest.approx(0.8 * 0.5 + 0.2 * 0.25)
    table = chart(report)
    assert [column.header for column in table.columns][:3] == ["layer", "expert", "tokens"] and table.row_count == 4


def test_nothing_counted():
    with pytest.raises(ValueError, match="nothing"):
        summarise(0, *[np.zeros((1, 1), np.int64)] * 3)


@pytest.mark.parametrize(("share", "drawn"), [(0.0, ""), (1.0, "████"), (0.5, "██"), (0.53125, "██▏"), (2.0, "████")])
def test_bars(share, drawn):
    assert bar(share, width=4) == drawn.ljust(4)
