"""The benchmarks: tasks of lm-evaluation-harness that read local files instead of data sets from the hub.

Prompts, answers, metrics and few-shot examples are those of the harness's own YAML files. What stands here is where
each task's rows lie below the data folder, what their fields must hold, and which of the task's metrics is its score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from turbosparse.errors import UserError
from turbosparse.evaluate import rules
from turbosparse.evaluate.data_folder import DataFolder, Row
from turbosparse.evaluate.rules import Rule


def _as_it_is(row: Row) -> Row | None:
    return row


@dataclass(frozen=True)
class Part:
    """One task of the harness and its rows.

    Attributes:
        name: the harness's.
        files: for each split of the task, the file; a split that is not named does not exist.
        fields: what a row must have after `adapt`, and what the task's templates can read there.
        adapt: makes the harness's row of the file's row; None leaves it out, a KeyError names a field that is wrong.
    """

    name: str
    files: Mapping[str, str]
    fields: Mapping[str, Rule]
    adapt: Callable[[Row], Row | None] = _as_it_is

    def rows(self, data: DataFolder) -> dict[str, list[Row]]:
        """The rows of every split.

        Raises:
            UserError: a row has no valid value in a field, or as `DataFolder.rows`.
        """
        return {split: list(self._adapted(file, data)) for split, file in self.files.items()}

    def _adapted(self, file: str, data: DataFolder) -> Iterator[Row]:
        for number, row in enumerate(data.rows(file), start=1):
            try:
                adapted = self._checked(row)
            except KeyError as error:
                wrong = error.args[0]
                raise UserError(f"{file}, record {number}: no valid {wrong!r}, which {self.name} needs.") from None
            if adapted is not None:
                yield adapted

    def _checked(self, row: Row) -> Row | None:
        """The harness's row; a KeyError names the first field that is missing or not valid."""
        try:
            adapted = self.adapt(row)
        except (IndexError, AttributeError, TypeError, ValueError):
            raise KeyError(next(iter(self.fields))) from None
        if adapted is not None:
            for field, valid in self.fields.items():
                if not valid(adapted[field], adapted):
                    raise KeyError(field)
        return adapted


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

    def digest(self, data: DataFolder) -> str:
        """Tells the content of the task's files from any other; raises as `DataFolder.rows`."""
        return data.digest({file for part in self.parts(data) for file in part.files.values()})


class Choice(NamedTuple):
    """A task, by its key in `TASKS`, and its number of solved examples."""

    task: str
    shots: int


def _one(
    name: str, files: Mapping[str, str], texts: str, adapt: Callable[[Row], Row | None] = _as_it_is, **others: Rule
) -> Callable[[DataFolder], list[Part]]:
    """A task of one part, whose rows have these texts, and other fields by their rules."""
    return lambda _: [Part(name, files, dict.fromkeys(texts.split(), rules.text) | others, adapt)]


def _lettered(row: Row) -> Row:
    """ARC and OpenBookQA rows of one of two kinds: the hub's, or a written-out question with the answer's index."""
    if "query" not in row:
        return row
    question = row["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    letters = [chr(ord("A") + index) for index in range(len(row["choices"]))]
    choices = {"text": row["choices"], "label": letters}
    if row["gold"] not in range(len(letters)):
        raise KeyError("gold")
    return {"question": question, "question_stem": question, "choices": choices, "answerKey": letters[row["gold"]]}


def _with_last_word(row: Row) -> Row:
    """LAMBADA: the harness cuts the last word off the text by itself."""
    if not rules.texts(row["choices"], row):
        raise KeyError("choices")
    return {"text": row["query"] + " " + row["choices"][0]}


def _with_label(row: Row) -> Row:
    """BoolQ: whether the answer is yes."""
    if row["answer"] not in (False, True):
        raise KeyError("answer")
    return row | {"label": int(row["answer"])}


def _answers(row: Row, column: str) -> list[str]:
    answers = [answer.strip() for answer in (row[column] or "").split(";") if answer.strip()]
    if not answers:
        raise KeyError(column)
    return answers


def _with_answers(row: Row) -> Row:
    """TruthfulQA's table: every answer and whether it is true."""
    true, false = _answers(row, "Correct Answers"), _answers(row, "Incorrect Answers")
    targets = {"choices": true + false, "labels": [1] * len(true) + [0] * len(false)}
    return {"question": row["Question"].strip(), "mc1_targets": targets, "mc2_targets": targets}


def _subject(row: Row) -> str:
    """The subject of an MMLU row, "" where it has none."""
    subject = row.get("subject")
    return subject if isinstance(subject, str) else ""


def _of_subject(subject: str, row: Row) -> Row | None:
    if not _subject(row):
        raise KeyError("subject")
    return row if _subject(row) == subject else None


def _mmlu(data: DataFolder) -> list[Part]:
    files = {"dev": "mmlu/dev.jsonl", "test": "mmlu/test.jsonl"}
    subjects = sorted({_subject(row) for row in data.rows(files["test"])})
    fields: dict[str, Rule] = {
        "question": rules.text,
        "choices": partial(rules.texts, least=4),
        "answer": rules.one_of(*range(4), *"ABCD"),
    }
    return [
        Part(f"mmlu_{subject}" if subject else "mmlu", files, fields, partial(_of_subject, subject))
        for subject in subjects
    ]


_MATH = {
    "algebra": "algebra",
    "counting_and_prob": "counting_and_probability",
    "geometry": "geometry",
    "intermediate_algebra": "intermediate_algebra",
    "num_theory": "number_theory",
    "prealgebra": "prealgebra",
    "precalc": "precalculus",
}
_MATH_FIELDS: dict[str, Rule] = {"problem": rules.text, "solution": rules.boxed}


def _math(_: DataFolder) -> list[Part]:
    return [
        Part(f"minerva_math_{name}", {"test": f"math/minerva_math_{file}.jsonl"}, _MATH_FIELDS)
        for name, file in _MATH.items()
    ]


def _test_split(row: Row) -> Row | None:
    """MBPP: the file holds all splits; tasks 11 to 510 are the test split."""
    return row if 11 <= row["task_id"] <= 510 else None


def _files(folder: str, *splits: str) -> dict[str, str]:
    return {split: f"{folder}/{split}.jsonl" for split in splits}


_LETTERED: dict[str, Rule] = {"choices": rules.lettered_texts, "answerKey": rules.letter}
TASKS: dict[str, LocalTask] = {
    "arc_easy": LocalTask(
        "arc",
        _one("arc_easy", _files("arc_easy", "validation", "test"), "question", _lettered, **_LETTERED),
        "acc_norm",
    ),
    "arc_challenge": LocalTask(
        "arc",
        _one("arc_challenge", _files("arc_challenge", "validation", "test"), "question", _lettered, **_LETTERED),
        "acc_norm",
    ),
    "boolq": LocalTask(
        "super_glue/boolq", _one("boolq", _files("boolq", "validation"), "passage question", _with_label)
    ),
    "hellaswag": LocalTask(
        "hellaswag",
        _one(
            "hellaswag",
            _files("hellaswag", "validation"),
            "activity_label ctx_a",
            ctx_b=rules.maybe_empty,
            endings=rules.texts,
            label=rules.ending,
        ),
        "acc_norm",
    ),
    "lambada": LocalTask("lambada", _one("lambada_openai", _files("lambada", "test"), "text", _with_last_word)),
    "mmlu": LocalTask("mmlu/default", _mmlu),
    "openbookqa": LocalTask(
        "openbookqa",
        _one(
            "openbookqa",
            _files("openbookqa", "validation", "test"),
            "question_stem",
            _lettered,
            choices=rules.lettered_texts,
            answerKey=rules.padded_letter,
        ),
        "acc_norm",
    ),
    "piqa": LocalTask(
        "piqa", _one("piqa", _files("piqa", "validation"), "goal sol1 sol2", label=rules.one_of(0, 1)), "acc_norm"
    ),
    "sciq": LocalTask(
        "sciq",
        _one(
            "sciq",
            _files("sciq", "validation"),
            "question distractor1 distractor2 distractor3 correct_answer",
            support=rules.maybe_empty,
        ),
        "acc_norm",
    ),
    "truthfulqa": LocalTask(
        "truthfulqa",
        _one("truthfulqa_mc2", {"validation": "truthfulqa/TruthfulQA.csv"}, "question", _with_answers),
    ),
    "winogrande": LocalTask(
        "winogrande",
        _one(
            "winogrande",
            _files("winogrande", "validation"),
            "option1 option2",
            sentence=rules.with_a_gap,
            answer=rules.one_of("1", "2"),
        ),
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
        _one("minerva_math500", {"test": "math/minerva_math_500.jsonl"}, "problem", solution=rules.boxed),
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
        _one("mbpp", {"test": "mbpp/mbpp.jsonl"}, "text code", _test_split, test_list=partial(rules.texts, least=3)),
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
