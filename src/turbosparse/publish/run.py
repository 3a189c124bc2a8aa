"""What a training run left behind, read back for the card: its recipe and what every stage reached."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import yaml
from pydantic import ValidationError

from turbosparse.errors import UserError
from turbosparse.relufy import recipes

Metrics = dict[str, float]


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe that is done: what it was told, its last validation, how many tokens it trained on."""

    settings: recipes.Stage
    metrics: Metrics
    tokens: int


@dataclass(frozen=True)
class Run:
    """The stages up to the one that wrote `folder`, in order, and the text of the last one's recipe.

    `start` is the name of the model that the first of these stages began with: what that was trained on is not counted.
    """

    folder: Path
    start: str
    stages: list[Stage]
    data: recipes.Data

    @property
    def tokens(self) -> int:
        return sum(stage.tokens for stage in self.stages)

    @property
    def metrics(self) -> Metrics:
        return self.stages[-1].metrics


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a file.

    Raises:
        UserError: the file is missing or holds something else.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path.") from None
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise UserError(f"{path}: holds no JSON object; use what `--json` printed or a run wrote.")
    return record


def _finite(value: object) -> bool:
    """Whether a JSON value is a number that a float can hold, which not every integer is."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _metrics(path: Path) -> Metrics:
    metrics = read_json(path)
    for name, value in metrics.items():
        if not _finite(value):
            raise UserError(f"{path}: {name[:60]!r} is not a finite number; give the folder as the run left it.")
    return metrics


def _tokens(log: Path) -> int:
    """Tokens at the last report of a stage's log."""
    try:
        reports = [json.loads(line)["tokens"] for line in log.read_text(encoding="utf-8").splitlines()]
        if not all(map(_finite, reports)):
            raise ValueError
        return int(max(reports))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{log}: is no log of `turbosparse train`; give the folder as the run left it.") from None


def _recipe(path: Path) -> recipes.Recipe:
    """The recipe that a run keeps, as it is written: where it is published its paths and variables may mean nothing.

    Raises:
        UserError: `train` would not take it.
    """
    try:
        return recipes.Recipe.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"{'.'.join(map(str, first['loc'])) or 'all of it'}: {first['msg']}"
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError):
        problem = "it cannot be read as YAML"
    shown = " ".join(problem.split())[:200]
    raise UserError(f"{path}: is no recipe that `turbosparse train` takes ({shown}); put back the run's own.")


def _run_before(model: str, later: frozenset[Path]) -> Run | None:
    """The run that this model comes from.

    None where the model is no stage of a run, is not there now, or is named by a relative path, which was relative to
    the recipe's first place.
    """
    source = Path(model)
    if not source.is_absolute() or not (source.parent / "recipe.yaml").is_file():
        return None
    return read_run(source, later)


def read_run(folder: Path, later: frozenset[Path] = frozenset()) -> Run:
    """The run that made a model folder (`OUTPUT/2-recover`), from what lies beside it, and those that it went on from.

    Args:
        folder: of a stage.
        later: recipes of the runs that went on from this one.

    Raises:
        UserError: the folder is not a stage of `turbosparse train`, or comes from itself.
    """
    place = folder.resolve()
    recipe_file = place.parent / "recipe.yaml"
    recipe = _recipe(recipe_file) if recipe_file.is_file() else None
    names = [f"{index}-{stage.name}" for index, stage in enumerate(recipe.stages, 1)] if recipe else []
    if recipe is None or place.name not in names:
        raise UserError(
            f"{folder}: is not a stage that `turbosparse train` wrote (no recipe.yaml beside it names it); "
            "give the folder where the run left it."
        )
    if recipe_file in later:
        raise UserError(f"{recipe_file}: goes on from a model that was made from its own; correct its `model`.")
    model = os.path.expandvars(recipe.model)
    before = _run_before(model, later | {recipe_file})
    stages = list(before.stages) if before else []
    for settings, name in zip(recipe.stages[: names.index(place.name) + 1], names, strict=False):
        stage = place.parent / name
        stages.append(Stage(settings, _metrics(stage / "metrics.json"), _tokens(stage / "log.jsonl")))
    return Run(folder, before.start if before else PurePath(model).name, stages, recipe.data)
