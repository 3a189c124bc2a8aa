"""What a training run left behind, read back for the card: its recipe and what every stage reached."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import yaml

from turbosparse.errors import UserError

Metrics = dict[str, float]


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe that is done: its YAML mapping, its last validation, how many tokens it trained on."""

    settings: dict[str, Any]
    metrics: Metrics
    tokens: int


@dataclass(frozen=True)
class Run:
    """The stages up to the one that wrote `folder`, in order, and the `data` mapping of the last one's recipe.

    `start` is the name of the model that the first of these stages began with: what that was trained on is not counted.
    """

    folder: Path
    start: str
    stages: list[Stage] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return sum(stage.tokens for stage in self.stages)

    @property
    def metrics(self) -> Metrics:
        return self.stages[-1].metrics


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path.") from None
    except ValueError:
        raise UserError(f"{path}: is not JSON; use what `--json` printed or a run wrote.") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a file.

    Raises:
        UserError: the file is missing or holds something else.
    """
    record = _json(path)
    if not isinstance(record, dict):
        raise UserError(f"{path}: holds no JSON object; use what `--json` printed.")
    return record


def _tokens(log: Path) -> int:
    """Tokens at the last report of a stage's log."""
    try:
        return max(int(json.loads(line)["tokens"]) for line in log.read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{log}: is no log of `turbosparse train`; give the folder as the run left it.") from None


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
    recipe_file = folder.resolve().parent / "recipe.yaml"
    try:
        recipe = yaml.safe_load(recipe_file.read_text(encoding="utf-8"))
        names = [f"{index}-{stage['name']}" for index, stage in enumerate(recipe["stages"], 1)]
        upto = names.index(folder.resolve().name) + 1
        data, model = dict(recipe["data"]), os.path.expandvars(str(recipe["model"]))
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        raise UserError(
            f"{folder}: is not a stage that `turbosparse train` wrote (no recipe.yaml beside it names it); "
            "give the folder where the run left it."
        ) from None
    if recipe_file in later:
        raise UserError(f"{recipe_file}: goes on from a model that was made from its own; correct its `model`.")
    before = _run_before(model, later | {recipe_file})
    stages = list(before.stages) if before else []
    for settings, name in zip(recipe["stages"][:upto], names, strict=False):
        stage = recipe_file.parent / name
        stages.append(Stage(settings, read_json(stage / "metrics.json"), _tokens(stage / "log.jsonl")))
    return Run(folder, before.start if before else PurePath(model).name, stages, data)
