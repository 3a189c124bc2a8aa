import itertools
from pathlib import Path

import pytest

from turbosparse.errors import UserError
from turbosparse.relufy.recipes import load_recipe
from turbosparse.relufy.schedule import learning_rate_share

_SHIPPED = Path(__file__).parents[2] / "recipes"
_RECIPE = """
model: models/dense
output: out
data:
  sources: [{domain: web, path: "web/*.jsonl"}]
  validation: [{domain: web, path: "$TEXT/held.jsonl"}]
stages:
  - {name: recover, objective: cross_entropy, tokens: 1.5M, learning_rate: 1.0e-3}
"""


def _write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_paths_counts_and_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("TEXT", "/text")
    recipe = load_recipe(_write(tmp_path, _RECIPE))
    assert recipe.stages[0].tokens == 1_500_000
    assert recipe.data.sources[0].path == str(tmp_path / "web/*.jsonl")
    assert recipe.data.validation[0].path == "/text/held.jsonl"
    assert recipe.model == str(tmp_path / "models/dense") or recipe.model == "models/dense"


@pytest.mark.parametrize("path", sorted(_SHIPPED.rglob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_that_ship_can_be_read(path, monkeypatch):
    for name in ("CORPUS", "WORK"):
        monkeypatch.setenv(name, "/nowhere")
    recipe = load_recipe(path)
    assert Path(recipe.output).is_relative_to("/nowhere/runs")


@pytest.mark.parametrize(
    ("edit", "word"),
    [
        (lambda t: t.replace("learning_rate", "learning_rat"), "learning_rat"),
        (lambda t: t + "\nfoo: 1\n", "foo"),
        (lambda t: t.replace("1.0e-3", "-1"), "learning_rate"),
        (lambda t: t.replace("1.5M", "9" * 400 + "M"), "tokens"),
        (lambda t: t.replace("cross_entropy", "layerwise"), "teacher"),
        (lambda t: t.replace('path: "web/*.jsonl"', "weight: 1"), "path"),
        (lambda t: t.replace("$TEXT", "$NOT_SET_ANYWHERE"), "environment variable"),
        (lambda t: t.replace("1.0e-3}", "1.0e-3, distillation: {teacher: a, sources: [own]}}"), "own is no domain"),
        (lambda t: t.replace("1.0e-3}", "1.0e-3, width: 2}"), "sides: best"),
        (lambda t: "- a list", "mapping"),
        (lambda t: "a: [", "YAML"),
        (lambda t: "seed: 2026-13-45", "YAML"),
        (lambda t: "[" * 50_000, "YAML"),
        (lambda t: t.replace("models/dense", "&a [*a]"), "itself"),
        (lambda t: t.replace("sources: [", "sources: [{domain: web, path: a.txt}, "), "web twice"),
    ],
)
def test_mistakes_give_one_sentence_that_names_the_key(tmp_path, monkeypatch, edit, word):
    monkeypatch.setenv("TEXT", "/text")
    with pytest.raises(UserError, match=word) as caught:
        load_recipe(_write(tmp_path, edit(_RECIPE)))
    assert "\n" not in str(caught.value)


def test_a_stage_of_the_recipe_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.setenv("TEXT", "/text")
    distilled = _RECIPE.replace("1.0e-3}", "1.0e-3, distillation: {teacher: out/1-recover}}")
    assert load_recipe(_write(tmp_path, distilled)).stages[0].distillation.teacher == str(tmp_path / "out/1-recover")


def test_missing_recipe(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.yaml"):
        load_recipe(tmp_path / "nothing.yaml")


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "warmup_stable_decay"])
def test_learning_rate_warms_up_and_ends_at_its_final_share(tmp_path, monkeypatch, schedule):
    monkeypatch.setenv("TEXT", "/text")
    extra = f"learning_rate: 1.0e-3, warmup: 0.1, final_lr_share: 0.2, schedule: {schedule}"
    stage = load_recipe(_write(tmp_path, _RECIPE.replace("learning_rate: 1.0e-3", extra))).stages[0]
    assert learning_rate_share(stage, 0.0) == 0.0
    assert learning_rate_share(stage, 0.05) == pytest.approx(0.5)
    assert learning_rate_share(stage, 0.1) == pytest.approx(1.0)
    assert learning_rate_share(stage, 1.0) == pytest.approx(1.0 if schedule == "constant" else 0.2)
    shares = [learning_rate_share(stage, i / 100) for i in range(10, 101)]
    assert all(a >= b for a, b in itertools.pairwise(shares))
