"""The benchmarks: tasks of lm-evaluation-harness that read local files instead of data sets from the hub.

Prompts, answers, metrics and few-shot examples are those of the harness's own YAML files. What stands here is where
each task's rows lie below the data folder, which fields they must have, and which of the task's metrics is its score.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from turbosparse.errors import UserError

Row = dict[str, Any]


class DataFolder:
    """The folder with a subfolder of files for each task; files are read when they are asked for, and kept."""

    def __init__(self, path: Path | None) -> None:
        if path is None:
            raise UserError("the tasks need their files; name the folder with --data-dir or TURBOSPARSE_EVAL_DATA.")
        if not path.is_dir():
            raise UserError(f"--data-dir {path} is not a folder; name the one that holds arc_easy/, piqa/ and so on.")
        self._path = path
        self._kept: dict[str, list[Row]] = {}

    def rows(self, file: str) -> list[Row]:
        """The records of a .jsonl or .csv file, given by its path below the folder.

        Raises:
            UserError: it is missing, damaged or empty.
        """
        if file not in self._kept:
            path = self._path / file
            if not path.is_file():
                raise UserError(f"{path} does not exist; --data-dir must name the folder that holds {file}.")
            try:
                text = path.read_text(encoding="utf-8-sig")
            except UnicodeDecodeError:
                raise UserError(f"{path} is not UTF-8 text; download it again.") from None
            self._kept[file] = list(_csv_rows(text) if path.suffix == ".csv" else _json_rows(path, text))
            if not self._kept[file]:
                raise UserError(f"{path} is empty; download it again.")
        return self._kept[file]


def _csv_rows(text: str) -> Iterable[Row]:
    return csv.DictReader(text.splitlines(keepends=True))


def _json_rows(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: not a JSON object; download the file again.")
        yield row


def _as_it_is(row: Row) -> Row | None:
    return row


@dataclass(frozen=True)
class Part:
    """One task of the harness and its rows.

    Attributes:
        name: the harness's.
        files: for each split of the task, the file; a split that is not named does not exist.
        fields: what a row must have after `adapt`: what the task's templates read.
        adapt: makes the harness's row of the file's row; None leaves it out.
    """

    name: str
    files: Mapping[str, str]
    fields: Sequence[str]
    adapt: Callable[[Row], Row | None] = _as_it_is

    def rows(self, data: DataFolder) -> dict[str, list[Row]]:
        """The rows of every split.

        Raises:
            UserError: a row lacks a field, or as `DataFolder.rows`.
        """
        return {split: list(self._adapted(file, data)) for split, file in self.files.items()}

    def _adapted(self, file: str, data: DataFolder) -> Iterator[Row]:
        for number, row in enumerate(data.rows(file), start=1):
            try:
                adapted = self.adapt(row)
            except (KeyError, IndexError, AttributeError, TypeError):
                adapted = {}
            if adapted is None:
                continue
            if missing := [field for field in self.fields if field not in adapted]:
                raise UserError(f"{file}, record {number}: no valid {missing[0]!r}, which {self.name} needs.")
            yield adapted


@dataclass(frozen=True)
class LocalTask:
    """A benchmark: one or several tasks of the harness whose items are pooled.

    Attributes:
        folder: where the harness keeps its YAML, below lm_eval/tasks.
        parts: the tasks, given the data.
        metric: the score: acc_norm (log-likelihoods divided by the answers' length) where the task has it.
        shots: solved examples in front of a question, unless a group says otherwise.
        filter: how an answer is taken out of generated text.
        runs_code: items are scored by running code that the model wrote.
    """

    folder: str
    parts: Callable[[DataFolder], list[Part]]
    metric: str = "acc"
    shots: int = 0
    filter: str = "none"
    runs_code: bool = False


class Choice(NamedTuple):
    """A task, by its key in `TASKS`, and its number of solved examples."""

    task: str
    shots: int


def _one(
    name: str, files: Mapping[str, str], fields: str, adapt: Callable[[Row], Row | None] = _as_it_is
) -> Callable[[DataFolder], list[Part]]:
    return lambda _: [Part(name, files, fields.split(), adapt)]


def _lettered(row: Row) -> Row:
    """ARC and OpenBookQA rows of one of two kinds: the hub's, or a written-out question with the answer's index."""
    if "query" not in row:
        return row
    question = row["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    letters = [chr(ord("A") + index) for index in range(len(row["choices"]))]
    choices = {"text": row["choices"], "label": letters}
    return {"question": question, "question_stem": question, "choices": choices, "answerKey": letters[row["gold"]]}


def _with_last_word(row: Row) -> Row:
    """LAMBADA: the harness cuts the last word off the text by itself."""
    return {"text": f"{row['query']} {row['choices'][0]}"}


def _with_label(row: Row) -> Row:
    return row | {"label": int(row["answer"])}


def _with_answers(row: Row) -> Row:
    """TruthfulQA's table: every answer and whether it is true."""
    true, false = (
        [answer.strip() for answer in row[f"{kind} Answers"].split(";") if answer.strip()]
        for kind in ("Correct", "Incorrect")
    )
    targets = {"choices": true + false, "labels": [1] * len(true) + [0] * len(false)}
    return {"question": row["Question"].strip(), "mc1_targets": targets, "mc2_targets": targets}


def _of_subject(subject: str, row: Row) -> Row | None:
    return row if row["subject"] == subject else None


def _mmlu(data: DataFolder) -> list[Part]:
    files = {"dev": "mmlu/dev.jsonl", "test": "mmlu/test.jsonl"}
    subjects = sorted({row.get("subject", "") for row in data.rows(files["test"])})
    fields = ("question", "choices", "answer")
    return [Part(f"mmlu_{subject}", files, fields, partial(_of_subject, subject)) for subject in subjects]


_MATH = {
    "algebra": "algebra",
    "counting_and_prob": "counting_and_probability",
    "geometry": "geometry",
    "intermediate_algebra": "intermediate_algebra",
    "num_theory": "number_theory",
    "prealgebra": "prealgebra",
    "precalc": "precalculus",
}


def _math(_: DataFolder) -> list[Part]:
    return [
        Part(f"minerva_math_{name}", {"test": f"math/minerva_math_{file}.jsonl"}, ("problem", "solution"))
        for name, file in _MATH.items()
    ]


def _test_split(row: Row) -> Row | None:
    """MBPP: the file holds all splits; tasks 11 to 510 are the test split."""
    return row if 11 <= row["task_id"] <= 510 else None


def _files(folder: str, *splits: str) -> dict[str, str]:
    return {split: f"{folder}/{split}.jsonl" for split in splits}


_LETTERED = "question choices answerKey"
TASKS: dict[str, LocalTask] = {
    "arc_easy": LocalTask(
        "arc", _one("arc_easy", _files("arc_easy", "validation", "test"), _LETTERED, _lettered), "acc_norm"
    ),
    "arc_challenge": LocalTask(
        "arc", _one("arc_challenge", _files("arc_challenge", "validation", "test"), _LETTERED, _lettered), "acc_norm"
    ),
    "boolq": LocalTask(
        "super_glue/boolq", _one("boolq", _files("boolq", "validation"), "passage question label", _with_label)
    ),
    "hellaswag": LocalTask(
        "hellaswag",
        _one("hellaswag", _files("hellaswag", "validation"), "activity_label ctx_a ctx_b endings label"),
        "acc_norm",
    ),
    "lambada": LocalTask("lambada", _one("lambada_openai", _files("lambada", "test"), "text", _with_last_word)),
    "mmlu": LocalTask("mmlu/default", _mmlu),
    "openbookqa": LocalTask(
        "openbookqa",
        _one("openbookqa", _files("openbookqa", "validation", "test"), "question_stem choices answerKey", _lettered),
        "acc_norm",
    ),
    "piqa": LocalTask("piqa", _one("piqa", _files("piqa", "validation"), "goal sol1 sol2 label"), "acc_norm"),
    "sciq": LocalTask(
        "sciq",
        _one(
            "sciq",
            _files("sciq", "validation"),
            "support question distractor1 distractor2 distractor3 correct_answer",
        ),
        "acc_norm",
    ),
    "truthfulqa": LocalTask(
        "truthfulqa",
        _one("truthfulqa_mc2", {"validation": "truthfulqa/TruthfulQA.csv"}, "question mc2_targets", _with_answers),
    ),
    "winogrande": LocalTask(
        "winogrande", _one("winogrande", _files("winogrande", "validation"), "sentence option1 option2 answer")
    ),
    "gsm8k": LocalTask(
        "gsm8k",
        _one("gsm8k", _files("gsm8k", "train", "test"), "question answer"),
        "exact_match",
        shots=5,
        filter="strict-match",
    ),
    "math": LocalTask("minerva_math", _math, "exact_match", shots=4),
    "math500": LocalTask(
        "minerva_math",
        _one("minerva_math500", {"test": "math/minerva_math_500.jsonl"}, "problem solution"),
        "exact_match",
        shots=4,
    ),
    "humaneval": LocalTask(
        "humaneval",
        _one("humaneval", {"test": "humaneval/HumanEval.jsonl"}, "prompt test entry_point"),
        "pass@1",
        filter="create_test",
        runs_code=True,
    ),
    "mbpp": LocalTask(
        "mbpp",
        _one("mbpp", {"test": "mbpp/mbpp.jsonl"}, "text code test_list", _test_split),
        "pass_at_1",
        shots=3,
        runs_code=True,
    ),
}

GROUPS: dict[str, tuple[Choice, ...]] = {
    "core": tuple(
        Choice(task, 0)
        for task in ("arc_easy", "boolq", "hellaswag", "lambada", "openbookqa", "piqa", "sciq", "winogrande")
    ),
    # Turbo Sparse (arXiv 2406.05955), section 6.1, reports the average of these four.
    "commonsense": tuple(Choice(task, 0) for task in ("piqa", "sciq", "arc_easy", "openbookqa")),
    # The Open LLM Leaderboard as it was in 2023-24, and its numbers of examples.
    "leaderboard": (
        Choice("arc_challenge", 25),
        Choice("hellaswag", 10),
        Choice("mmlu", 5),
        Choice("truthfulqa", 0),
        Choice("winogrande", 5),
        Choice("gsm8k", 5),
    ),
}


def choose(names: str, allow_code: bool = False) -> list[Choice]:
    """The tasks that a comma-separated list of tasks and groups names, each once, in its order.

    Raises:
        UserError: a name is unknown, or a task runs code and `allow_code` does not.
    """
    chosen: dict[Choice, None] = {}
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name in GROUPS:
            chosen |= dict.fromkeys(GROUPS[name])
        elif name in TASKS:
            chosen[Choice(name, TASKS[name].shots)] = None
        else:
            raise UserError(
                f"--tasks {name}: unknown; the tasks are {', '.join(TASKS)}, and the groups {', '.join(GROUPS)}."
            )
    if not chosen:
        raise UserError(f"--tasks names no task; the tasks are {', '.join(TASKS)}.")
    for choice in chosen:
        if TASKS[choice.task].runs_code and not allow_code:
            raise UserError(
                f"--tasks {choice.task} runs Python code that the model writes, on this machine and with your rights; "
                "do it inside a sandbox and add --allow-code."
            )
    return list(chosen)


def check(choices: Sequence[Choice], data: DataFolder) -> None:
    """Read the files of these tasks, so that a mistake in one is found before a model is loaded.

    Raises:
        UserError: as `Part.rows`.
    """
    for choice in choices:
        for part in TASKS[choice.task].parts(data):
            part.rows(data)
