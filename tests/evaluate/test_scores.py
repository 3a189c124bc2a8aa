import json
import math

import numpy as np
import pytest

from turbosparse.errors import UserError
from turbosparse.evaluate.scores import Estimate, Scores, TaskScore, average, compare
from turbosparse.evaluate.tasks import Choice

RNG = np.random.default_rng(0)


def score(task="piqa", n=50, items=None, **changes):
    items = tuple(float(x) for x in RNG.integers(0, 2, n)) if items is None else items
    return TaskScore(**{"task": task, "metric": "acc", "shots": 0, "fingerprint": task, "items": items} | changes)


def test_a_standard_error_is_that_of_a_mean():
    items = RNG.random(31)
    estimate = Estimate.of(items)
    assert estimate.value == pytest.approx(items.mean())
    assert estimate.stderr == pytest.approx(items.std(ddof=1) / math.sqrt(31))
    assert Estimate.of([1.0]) == Estimate(1.0, None)


def test_an_average_is_plain_and_its_error_that_of_independent_tasks():
    mean = average([Estimate(0.2, 0.03), Estimate(0.6, 0.04)])
    assert mean.value == pytest.approx(0.4) and mean.stderr == pytest.approx(0.025)
    assert average([Estimate(0.2, 0.03), Estimate(0.6, None)]).stderr is None


def test_a_comparison_is_paired_item_by_item():
    mine = Scores("a.gguf", "exact", {}, [score("piqa", 40), score("sciq", 60)])
    control = Scores("b.gguf", "dense", {}, [score("sciq", 60), score("boolq", 9), score("piqa", 40)])
    comparison = compare(mine, control)
    record = comparison.add_to(mine.to_json())
    errors = []
    for row, ours, theirs in zip(record["tasks"], mine.tasks, (control.tasks[2], control.tasks[0]), strict=True):
        difference = np.array(ours.items) - np.array(theirs.items)
        errors.append(difference.std(ddof=1) / math.sqrt(len(difference)))
        assert row["against"] == pytest.approx(np.mean(theirs.items))
        assert row["difference"] == pytest.approx(difference.mean()) == pytest.approx(row["value"] - row["against"])
        assert row["difference_stderr"] == pytest.approx(errors[-1])
    assert record["control"] == {"model": "b.gguf", "mode": "dense"}
    assert record["difference"] == pytest.approx(record["average"] - record["against"])
    assert record["difference_stderr"] == pytest.approx(math.hypot(*errors) / 2)


def test_a_model_against_itself_is_exactly_nothing():
    scores = Scores("a", "hf", {}, [score()])
    assert compare(scores, scores).mean == Estimate(0.0, 0.0)


@pytest.mark.parametrize("change", [{"fingerprint": "other"}, {"metric": "acc_norm"}, {"items": (1.0,)}])
def test_other_items_cannot_be_compared(change):
    with pytest.raises(UserError, match="different items of piqa"):
        compare(Scores("a", "hf", {}, [score()]), Scores("b", "hf", {}, [score(**change)]))


def test_a_task_that_is_missing_is_named():
    with pytest.raises(UserError, match="the scores of b lack piqa with 0 examples"):
        compare(Scores("a", "hf", {}, [score()]), Scores("b", "hf", {}, [score(shots=5)]))


def test_saved_scores_come_back(tmp_path):
    path = tmp_path / "a.json"
    scores = Scores("a.gguf", "exact", {"limit": 5, "files": {"a.gguf": [1, 2]}}, [score(), score("sciq", shots=5)])
    scores.save(path)
    assert Scores.load(path) == scores
    assert scores.find(Choice("sciq", 5)) == scores.tasks[1] and scores.find(Choice("sciq", 0)) is None
    record = json.loads(path.read_text())
    assert {key: record[key] for key in scores.to_json() if key != "tasks"}.items() <= scores.to_json().items()
    assert set(scores.to_json()["tasks"][0]) == {"task", "metric", "value", "stderr", "n", "shots"}
    assert list(tmp_path.iterdir()) == [path]


def test_scores_that_were_saved_before_files_had_digests_are_read(tmp_path):
    path = tmp_path / "a.json"
    Scores("a.gguf", "exact", {}, [score(data="digest")]).save(path)
    assert Scores.load(path).tasks[0].data == "digest"
    record = json.loads(path.read_text())
    del record["tasks"][0]["data"]
    path.write_text(json.dumps(record))
    assert Scores.load(path).tasks[0].data is None


@pytest.mark.parametrize(
    "content", ["", "[]", '{"tasks": 3}', '{"model": "a", "mode": "hf", "settings": {}, "tasks": []}']
)
def test_a_file_without_scores_is_one_sentence(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=r"a\.json"):
        Scores.load(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("items", "[NaN, 1]"),
        ("items", "[Infinity]"),
        ("items", "[-1]"),
        ("items", "[1e308, 1e308]"),
        ("items", f"[1{'0' * 400}]"),
        ("items", "[" * 100_000),
        ("shots", "Infinity"),
        ("shots", "NaN"),
    ],
)
def test_what_no_evaluation_writes_is_one_sentence(tmp_path, field, value):
    path = tmp_path / "a.json"
    Scores("a", "hf", {}, [score(items=(1.0,), shots=0)]).save(path)
    was = json.dumps({field: {"items": [1.0], "shots": 0}[field]})[1:-1]
    assert was in path.read_text()
    path.write_text(path.read_text().replace(was, f'"{field}": {value}'))
    with pytest.raises(UserError, match="does not hold scores that `turbosparse eval --output` wrote"):
        Scores.load(path)
