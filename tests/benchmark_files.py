"""Benchmarks of a few made-up items, in the files and fields that `turbosparse eval` reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

QUESTIONS = ("What barks?", "What flies south?", "Which of these is wet?", "What is read?")
THINGS = ("a dog", "some geese", "the sea", "books")
LETTERS = list("ABCD")


def _written_out(index: int) -> dict[str, Any]:
    query = f"Question: {QUESTIONS[index]}\nAnswer:"
    return {"id": str(index), "query": query, "choices": list(THINGS), "gold": index}


def _from_the_hub(index: int, field: str) -> dict[str, Any]:
    choices = {"text": list(THINGS), "label": ["1", "2", "3", "4"]}
    return {field: QUESTIONS[index], "choices": choices, "answerKey": str(index + 1)}


def _mmlu(index: int) -> dict[str, Any]:
    subject = ("anatomy", "virology")[index % 2]
    return {"question": QUESTIONS[index], "subject": subject, "choices": list(THINGS), "answer": index}


def _hellaswag(index: int) -> dict[str, Any]:
    # The harness cleans the WikiHow marks up.
    return {
        "activity_label": "Walking",
        "ctx_a": f"A man sees {THINGS[index]} [title] Then",
        "ctx_b": "he",
        "endings": [f"takes {thing} [step] home." for thing in THINGS],
        "label": str(index),
    }


def _math(index: int) -> dict[str, Any]:
    return {"problem": f"What is {index} + 1?", "solution": f"It is $\\boxed{{{index + 1}}}$."}


_MATH = (
    *("500", "algebra", "counting_and_probability", "geometry", "intermediate_algebra"),
    *("number_theory", "prealgebra", "precalculus"),
)

FILES: dict[str, Any] = {
    "arc_easy/validation.jsonl": lambda index: _from_the_hub(index, "question"),
    "arc_easy/test.jsonl": _written_out,
    "arc_challenge/validation.jsonl": lambda index: _from_the_hub(index, "question"),
    "arc_challenge/test.jsonl": _written_out,
    "openbookqa/validation.jsonl": lambda index: _from_the_hub(index, "question_stem"),
    "openbookqa/test.jsonl": _written_out,
    "boolq/validation.jsonl": lambda index: {
        "question": f"does {THINGS[index]} bark",
        "answer": index == 0,
        "passage": f"Here is {THINGS[index]}.",
    },
    "hellaswag/validation.jsonl": _hellaswag,
    "lambada/test.jsonl": lambda index: {"query": f'"Look," he said, "at {THINGS[index]}', "choices": ["there"]},
    "mmlu/dev.jsonl": _mmlu,
    "mmlu/test.jsonl": _mmlu,
    "piqa/validation.jsonl": lambda index: {
        "goal": QUESTIONS[index],
        "sol1": THINGS[index],
        "sol2": THINGS[index - 1],
        "label": 0,
    },
    "sciq/validation.jsonl": lambda index: {
        "question": QUESTIONS[index],
        "distractor1": "a",
        "distractor2": "b",
        "distractor3": "c",
        "correct_answer": THINGS[index],
        "support": "",
    },
    "winogrande/validation.jsonl": lambda index: {
        "sentence": f"The box was not in the bag as _ was too {('big', 'small')[index % 2]}.",
        "option1": "box",
        "option2": "bag",
        "answer": str(index % 2 + 1),
    },
    "gsm8k/train.jsonl": lambda index: {"question": f"{index} and 1?", "answer": f"So it is.\n#### {index + 1}"},
    "gsm8k/test.jsonl": lambda index: {"question": f"{index} and 2?", "answer": f"So it is.\n#### {index + 2}"},
    "humaneval/HumanEval.jsonl": lambda index: {
        "task_id": f"HumanEval/{index}",
        "prompt": f"def f():\n    return {index} +",
        "entry_point": "f",
        "canonical_solution": " 1",
        "test": f"def check(f):\n    assert f() == {index + 1}",
    },
    **{f"math/minerva_math_{name}.jsonl": _math for name in _MATH},
}
_TRUTH = (
    "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n"
    '"Adversarial","Animals","Can, say, dogs talk? ","No","No; They only bark;","Yes; They speak English; Some","x"\n'
    '"Adversarial","Water","Is the sea wet?","Yes","Yes","No","x"\n'
)


def write_benchmarks(folder: Path, copies: int = 1) -> Path:
    """Write four items (times `copies`) for every task; returns `folder`."""
    for file, item in FILES.items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(item(index)) + "\n" for index in range(4)) * copies, encoding="utf-8")
    train = [FILES["gsm8k/train.jsonl"](index) for index in range(8)]
    (folder / "gsm8k/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in train), encoding="utf-8")
    mbpp = [
        {"text": "Return one.", "code": "def f(): return 1", "task_id": number, "test_list": ["assert f() == 1"] * 3}
        for number in (10, 11, 510, 511)
    ]
    (folder / "mbpp").mkdir(exist_ok=True)
    (folder / "mbpp/mbpp.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mbpp), encoding="utf-8")
    (folder / "truthfulqa").mkdir(exist_ok=True)
    (folder / "truthfulqa/TruthfulQA.csv").write_text(_TRUTH, encoding="utf-8")
    return folder
