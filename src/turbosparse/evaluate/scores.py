"""Scores of a model on tasks, item by item, so that two models can be compared on the same items.

A score is the mean over a task's items, its standard error the items' standard deviation over the square root of their
number. Two models that answered the same items are compared by the items' differences: what is hard for both cancels
out, so the error of the difference is smaller than those of the scores (Miller 2024, arXiv 2411.00640, section 4.2).
Tasks are independent: the error of an average over k tasks is the root of the sum of squares, over k.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from turbosparse.errors import UserError
from turbosparse.evaluate.tasks import Choice

_MOST = 1 + 1e-9  # of an item's score: every metric is a share, and a sum of probabilities may round up


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error; None where a single item allows none."""

    value: float
    stderr: float | None

    @classmethod
    def of(cls, items: Sequence[float]) -> Estimate:
        return cls(fmean(items), stdev(items) / math.sqrt(len(items)) if len(items) > 1 else None)


def average(estimates: Sequence[Estimate]) -> Estimate:
    """The plain mean of independent estimates."""
    errors = [estimate.stderr for estimate in estimates]
    known = [error for error in errors if error is not None]
    stderr = math.sqrt(sum(error**2 for error in known)) / len(errors) if len(known) == len(errors) else None
    return Estimate(fmean(estimate.value for estimate in estimates), stderr)


@dataclass(frozen=True)
class TaskScore:
    """How a model did on one task: `items` holds the metric of every item, in the file's order.

    `fingerprint` tells items and prompts from others: only scores with the same one can be compared. `data` tells the
    task's files from others before any item is answered; None in what was saved before there was such a digest.
    """

    task: str
    metric: str
    shots: int
    fingerprint: str
    items: tuple[float, ...]
    data: str | None = None

    @property
    def choice(self) -> Choice:
        return Choice(self.task, self.shots)

    @property
    def estimate(self) -> Estimate:
        return Estimate.of(self.items)

    def minus(self, control: TaskScore) -> Estimate:
        """The difference to another model's score on the same items, with its paired standard error."""
        return Estimate.of([mine - theirs for mine, theirs in zip(self.items, control.items, strict=True)])

    def to_json(self) -> dict[str, Any]:
        estimate = self.estimate
        return {
            "task": self.task,
            "metric": self.metric,
            "value": estimate.value,
            "stderr": estimate.stderr,
            "n": len(self.items),
            "shots": self.shots,
        }


@dataclass
class Scores:
    """What `eval` found out about a model. `settings` is what else the scores depend on."""

    model: str
    mode: str
    settings: dict[str, Any] = field(default_factory=dict)
    tasks: list[TaskScore] = field(default_factory=list)

    def find(self, choice: Choice) -> TaskScore | None:
        return next((score for score in self.tasks if score.choice == choice), None)

    def only(self, choices: Sequence[Choice]) -> Scores:
        """These tasks, in this order.

        Raises:
            UserError: one is missing.
        """
        found = [(choice, self.find(choice)) for choice in choices]
        for choice, score in found:
            if score is None:
                raise UserError(
                    f"the scores of {self.model} lack {choice.task} with {choice.shots} examples; "
                    "evaluate it there too."
                )
        return Scores(self.model, self.mode, self.settings, [score for _, score in found if score is not None])

    def to_json(self) -> dict[str, Any]:
        mean = average([score.estimate for score in self.tasks])
        return {
            "model": self.model,
            "mode": self.mode,
            "tasks": [score.to_json() for score in self.tasks],
            "average": mean.value,
            "average_stderr": mean.stderr,
        }

    def save(self, path: Path) -> None:
        """Write everything, items included; the file is whole whenever it is seen."""
        record = self.to_json() | {"settings": self.settings}
        for shown, score in zip(record["tasks"], self.tasks, strict=True):
            shown |= {"fingerprint": score.fingerprint, "data": score.data, "items": score.items}
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(record) + "\n", encoding="utf-8")
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path) -> Scores:
        """Read what `save` wrote.

        Raises:
            UserError: the file is something else.
        """
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            tasks = [_task_score(task) for task in record["tasks"]]
            scores = cls(str(record["model"]), str(record["mode"]), dict(record["settings"]), tasks)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise UserError(f"{path} does not hold scores that `turbosparse eval --output` wrote.") from None
        if not tasks or not all(score.items for score in tasks):
            raise UserError(f"{path} holds no scores; evaluate the model first.")
        return scores


def _task_score(record: dict[str, Any]) -> TaskScore:
    """What `Scores.save` wrote of a task; of anything else, an error of Python's."""
    items = tuple(map(float, record["items"]))
    if not all(0 <= item <= _MOST for item in items):
        raise ValueError("not a share")
    data = record.get("data")
    return TaskScore(
        str(record["task"]),
        str(record["metric"]),
        int(record["shots"]),
        str(record["fingerprint"]),
        items,
        None if data is None else str(data),
    )


@dataclass(frozen=True)
class Comparison:
    """Differences of a model to its control, a task each and on average, over the same items."""

    control: Scores
    differences: tuple[Estimate, ...]

    @property
    def mean(self) -> Estimate:
        return average(self.differences)

    def add_to(self, record: dict[str, Any]) -> dict[str, Any]:
        """The model's JSON with the control's scores and the differences."""
        control = self.control.to_json()
        tasks = [
            task | _compared(other["value"], difference)
            for task, other, difference in zip(record["tasks"], control["tasks"], self.differences, strict=True)
        ]
        names = {"control": {"model": self.control.model, "mode": self.control.mode}}
        return record | {"tasks": tasks} | names | _compared(control["average"], self.mean)


def _compared(against: float, difference: Estimate) -> dict[str, float | None]:
    return {"against": against, "difference": difference.value, "difference_stderr": difference.stderr}


def compare(model: Scores, control: Scores) -> Comparison:
    """Compare a model with its control on all of the model's tasks.

    Raises:
        UserError: the control lacks a task, or answered other items of it.
    """
    control = control.only([score.choice for score in model.tasks])
    for mine, theirs in zip(model.tasks, control.tasks, strict=True):
        if (mine.metric, mine.fingerprint, len(mine.items)) != (theirs.metric, theirs.fingerprint, len(theirs.items)):
            raise UserError(
                f"{model.model} and {control.model} answered different items of {mine.task}; "
                "evaluate both with the same --data-dir and --limit."
            )
    pairs = zip(model.tasks, control.tasks, strict=True)
    return Comparison(control, tuple(mine.minus(theirs) for mine, theirs in pairs))


def points(value: float, stderr: float | None, sign: str = "") -> str:
    """0.4321, 0.01 as "43.21 ± 1.00": percent, or percent points; `sign` as in format strings."""
    return f"{100 * value:{sign}.2f}" + ("" if stderr is None else f" ± {100 * stderr:.2f}")
