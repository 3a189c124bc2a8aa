"""The benchmarks as models see them: the harness's own prompts, from our files."""

import json
import math
import os
import shutil

import pytest
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate

from turbosparse.errors import UserError
from turbosparse.evaluate import harness
from turbosparse.evaluate.data_folder import DataFolder
from turbosparse.evaluate.tasks import GROUPS, TASKS, Choice, check, choose


class Recorder(LM):
    """Answers by a rule and keeps what it was asked."""

    def __init__(self, likes=lambda context, answer: -float(len(answer)), writes="The answer is 1. #### 3"):
        super().__init__()
        self.likes, self.writes, self.asked = likes, writes, []

    def loglikelihood(self, requests):
        self.asked += [request.args for request in requests]
        return [(self.likes(*request.args), False) for request in requests]

    def loglikelihood_rolling(self, requests):
        raise AssertionError("no task of ours asks for it")

    def generate_until(self, requests):
        self.asked += [request.args for request in requests]
        return [self.writes for _ in requests]


# The first request of every task: what stands before, and the answers (all of the first item).
FIRST = {
    "arc_easy": ("Question: What barks?\nAnswer:", [" a dog", " some geese", " the sea", " books"]),
    "arc_challenge": ("Question: What barks?\nAnswer:", [" a dog", " some geese", " the sea", " books"]),
    "boolq": ("Here is a dog.\nQuestion: does a dog bark?\nAnswer:", [" no", " yes"]),
    "hellaswag": (
        "Walking: A man sees a dog. Then He",
        [" takes a dog home.", " takes some geese home.", " takes the sea home.", " takes books home."],
    ),
    "lambada": ('"Look," he said, "at a dog', [" there"]),
    "mmlu": (
        "The following are multiple choice questions (with answers) about anatomy.\n\nWhat barks?\nA. a dog\n"
        "B. some geese\nC. the sea\nD. books\nAnswer:",
        [" A", " B", " C", " D"],
    ),
    "openbookqa": ("What barks?", [" a dog", " some geese", " the sea", " books"]),
    "piqa": ("Question: What barks?\nAnswer:", [" a dog", " books"]),
    "sciq": ("\nQuestion: What barks?\nAnswer:", [" a", " b", " c", " a dog"]),
    "truthfulqa": (
        "A: The 1992 Olympics were held in Barcelona, Spain.\n\nQ: Can, say, dogs talk?\nA:",
        [" No", " They only bark", " Yes", " They speak English", " Some"],
    ),
    "winogrande": ("The box was not in the bag as box", [" was too big."]),
}


@pytest.mark.parametrize("name", FIRST)
def test_prompts_are_those_of_the_harness(benchmarks, name):
    model = Recorder()
    score = harness.run(model, Choice(name, 0), DataFolder(benchmarks))
    context, answers = FIRST[name]
    assert model.asked[0][0].endswith(context) and (name == "truthfulqa" or model.asked[0][0] == context)
    assert [answer for _, answer in model.asked[: len(answers)]] == answers
    assert (score.task, score.metric, score.shots) == (name, TASKS[name].metric, 0)
    assert len(score.items) == (2 if name == "truthfulqa" else 4)


@pytest.mark.parametrize("name", [name for name in FIRST if name != "truthfulqa"])
def test_who_knows_the_answers_scores_one(benchmarks, name):
    """Every right answer is recognised by words that only it has; winogrande's by its context."""
    right = {"dog": "barks", "geese": "flies", "sea": "wet", "books": "read"}

    def likes(context, answer):
        question = context.rsplit("Question:", 1)[-1].rsplit("\n\n", 1)[-1]
        if name == "boolq":
            return float((" a dog bark" in question) == (answer == " yes"))
        if name == "hellaswag":
            return float(any(thing in question and thing in answer for thing in right))
        if name == "winogrande":
            return float(("as box" in question) == ("big" in answer))
        if name == "mmlu":
            lines = question.splitlines()
            answer = next(line for line in lines if line.startswith(answer.strip() + ". "))
            question = lines[0]
        return float(any(thing in answer and word in question for thing, word in right.items()))

    model = Recorder(likes)
    score = harness.run(model, Choice(name, 0), DataFolder(benchmarks))
    if name == "lambada":  # right is what greedy decoding writes, and the recorder never says that it would
        assert score.items == (0.0,) * 4
    else:
        assert score.items == (1.0,) * 4 and score.estimate.stderr == 0


@pytest.mark.parametrize(
    ("name", "shots", "solved"), [("arc_challenge", 3, " a dog"), ("mmlu", 1, " B"), ("gsm8k", 5, "#### 4")]
)
def test_examples_come_with_their_answers(benchmarks, name, shots, solved):
    model = Recorder()
    score = harness.run(model, Choice(name, shots), DataFolder(benchmarks))
    assert score.shots == shots
    contexts = [context for context, _ in model.asked]
    assert all(context.count("\n\n") == shots + (name == "mmlu") for context in contexts)
    assert any(solved in context for context in contexts)


def test_an_item_is_never_its_own_example(benchmarks):
    """HellaSwag and WinoGrande have a single split, so examples come from the items."""
    model = Recorder()
    harness.run(model, Choice("hellaswag", 3), DataFolder(benchmarks))
    for context, _ in model.asked:
        assert len(set(context.split("\n\n"))) == 4


@pytest.mark.parametrize(("name", "most"), [("arc_easy", 4), ("hellaswag", 3), ("mmlu", 2), ("gsm8k", 8)])
def test_more_examples_than_rows_are_one_sentence(benchmarks, name, most):
    harness.run(Recorder(), Choice(name, most), DataFolder(benchmarks))
    with pytest.raises(UserError, match=f"with {most + 1} examples has too few rows"):
        harness.run(Recorder(), Choice(name, most + 1), DataFolder(benchmarks))


def test_generated_answers_are_filtered_as_the_harness_does(benchmarks):
    data = DataFolder(benchmarks)
    assert harness.run(Recorder(writes="So. #### 3"), Choice("gsm8k", 2), data).items == (0, 1, 0, 0)
    assert harness.run(Recorder(writes="So it is 3"), Choice("gsm8k", 2), data).items == (0, 0, 0, 0)
    final = "Final Answer: The final answer is $2$. I hope it is correct."
    assert harness.run(Recorder(writes=final), Choice("math500", 4), data).items == (0, 1, 0, 0)
    assert harness.run(Recorder(writes=final), Choice("math", 4), data).items == (0, 1, 0, 0) * 7


def test_truthfulqa_is_the_mass_on_true_answers(benchmarks):
    score = harness.run(Recorder(lambda context, answer: -1.0), Choice("truthfulqa", 0), DataFolder(benchmarks))
    assert score.items == pytest.approx((2 / 5, 1 / 2))


def test_scores_and_errors_are_those_that_the_harness_computes(benchmarks):
    """Of every task whose score is a mean over one task of the harness."""
    data = DataFolder(benchmarks)
    for name, task in TASKS.items():
        if task.runs_code:
            continue
        parts = harness._load(task, task.parts(data), task.shots, data)
        if len(parts) > 1:
            continue
        model = Recorder(lambda context, answer: math.sin(len(context) * len(answer)))
        theirs = evaluate(model, {"tasks": parts}, bootstrap_iters=100)["results"][next(iter(parts))]
        ours = harness.run(model, Choice(name, task.shots), data)
        assert ours.estimate.value == pytest.approx(theirs[f"{task.metric},{task.filter}"]), name
        assert ours.estimate.stderr == pytest.approx(theirs[f"{task.metric}_stderr,{task.filter}"]), name


def test_a_limit_takes_the_first_items_of_every_part(benchmarks):
    data = DataFolder(benchmarks)
    whole = harness.run(Recorder(), Choice("piqa", 0), data)
    limited = harness.run(Recorder(), Choice("piqa", 0), data, limit=3)
    assert limited.items == whole.items[:3] and limited.fingerprint != whole.fingerprint
    assert len(harness.run(Recorder(), Choice("mmlu", 0), data, limit=3).items) == 4  # two of each subject
    assert harness.run(Recorder(), Choice("piqa", 0), data, limit=4) == whole


def test_choosing():
    assert choose("piqa, core") == [Choice("piqa", 0), *(c for c in GROUPS["core"] if c.task != "piqa")]
    assert choose("gsm8k,arc_challenge") == [Choice("gsm8k", 5), Choice("arc_challenge", 0)]
    assert [c.task for c in choose("leaderboard,arc_challenge")].count("arc_challenge") == 2
    assert choose("mbpp", allow_code=True) == [Choice("mbpp", 3)]
    for names, part in (("piqaa", "piqaa"), (" ,", "no task"), ("humaneval", "--allow-code"), ("piqa,mbpp", "sandbox")):
        with pytest.raises(UserError, match=part):
            choose(names)
    assert all(choice.task in TASKS for group in GROUPS.values() for choice in group)


DAMAGE = {
    "missing": (None, "does not exist; --data-dir"),
    "empty": ("", "is empty"),
    "not JSON": ('{"goal": "x"}\n{"goal":\n', "validation.jsonl, line 2: not a JSON object"),
    "a list": ("[1]\n", "line 1: not a JSON object"),
    "no such field": ('{"goal": "x", "sol1": "a", "label": 0}\n', "record 1: no valid 'sol2', which piqa needs"),
    "not UTF-8": ("\udcff", "not UTF-8"),
    "deep": ("[" * 200_000, "line 1: not a JSON object"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files_are_named(tmp_path, case):
    content, sentence = DAMAGE[case]
    (tmp_path / "piqa").mkdir()
    if content is not None:
        (tmp_path / "piqa/validation.jsonl").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=sentence):
        check([Choice("piqa", 0)], DataFolder(tmp_path))


def test_rows_that_cannot_be_adapted_or_put_together_are_named(tmp_path):
    for folder, rows, sentence in (
        ("arc_easy", [{"query": "Question: x", "choices": ["a"], "gold": 3}], "test.jsonl, record 1"),
        ("lambada", [{"query": 1, "choices": ["x"]}], "record 1: no valid 'text'"),
        ("piqa", [{"goal": "x", "sol1": "a", "sol2": "b", "label": 0, "x": x} for x in (0, [])], "of the same types"),
        ("mmlu", [{"question": "x", "choices": ["a"] * 4, "answer": 0, "subject": "nonsense"}], "a task mmlu_nonsense"),
    ):
        (tmp_path / folder).mkdir()
        for split in ("validation", "dev", "test"):
            whole = {"question": "x", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "A"}
            content = [whole] if (folder, split) == ("arc_easy", "validation") else rows
            (tmp_path / folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
        with pytest.raises(UserError, match=sentence):
            harness.run(Recorder(), Choice(folder, 0), DataFolder(tmp_path))


WRONG = [
    ("boolq", "boolq/validation.jsonl", "answer", "yes"),
    ("boolq", "boolq/validation.jsonl", "passage", None),
    ("hellaswag", "hellaswag/validation.jsonl", "label", ""),
    ("hellaswag", "hellaswag/validation.jsonl", "label", "-1"),
    ("hellaswag", "hellaswag/validation.jsonl", "label", 4),
    ("hellaswag", "hellaswag/validation.jsonl", "endings", None),
    ("winogrande", "winogrande/validation.jsonl", "answer", ""),
    ("winogrande", "winogrande/validation.jsonl", "sentence", "no gap"),
    ("arc_easy", "arc_easy/validation.jsonl", "answerKey", "Z"),
    ("arc_easy", "arc_easy/validation.jsonl", "choices", ["a", "b"]),
    ("arc_easy", "arc_easy/test.jsonl", "gold", -1),
    ("openbookqa", "openbookqa/validation.jsonl", "answerKey", ""),
    ("piqa", "piqa/validation.jsonl", "label", 5),
    ("piqa", "piqa/validation.jsonl", "label", -1),
    ("piqa", "piqa/validation.jsonl", "label", "0"),
    ("piqa", "piqa/validation.jsonl", "sol2", ""),
    ("mmlu", "mmlu/test.jsonl", "subject", ["x"]),
    ("mmlu", "mmlu/dev.jsonl", "subject", None),
    ("mmlu", "mmlu/test.jsonl", "answer", -1),
    ("mmlu", "mmlu/test.jsonl", "choices", ["a"]),
    ("sciq", "sciq/validation.jsonl", "correct_answer", ""),
    ("lambada", "lambada/test.jsonl", "choices", [""]),
    ("gsm8k", "gsm8k/test.jsonl", "answer", ""),
    ("math500", "math/minerva_math_500.jsonl", "solution", r"It is $\boxed{\frac{1}{2}$."),
    ("mbpp", "mbpp/mbpp.jsonl", "test_list", ["assert f()"]),
]


@pytest.mark.parametrize(("task", "file", "field", "value"), WRONG)
def test_an_answer_that_is_none_is_named(benchmarks, tmp_path, task, file, field, value):
    """Splits without answers hold "" or -1 in their place: neither is scored."""
    shutil.copytree((benchmarks / file).parent, (tmp_path / file).parent)
    rows = [json.loads(line) for line in (tmp_path / file).read_text().splitlines()]
    check([Choice(task, 0)], DataFolder(tmp_path))
    rows[1][field] = value
    (tmp_path / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=f"^{file}, record 2: no valid '{field}', which "):
        check([Choice(task, 0)], DataFolder(tmp_path))


@pytest.mark.parametrize(
    ("cell", "sentence"), [("", "record 1: no valid 'Correct Answers', which"), ("x" * 200_000, "not a table")]
)
def test_a_table_that_is_none_is_named(benchmarks, tmp_path, cell, sentence):
    (tmp_path / "truthfulqa").mkdir()
    table = (benchmarks / "truthfulqa/TruthfulQA.csv").read_text().replace("No; They only bark;", cell)
    (tmp_path / "truthfulqa/TruthfulQA.csv").write_text(table)
    with pytest.raises(UserError, match=sentence):
        check([Choice("truthfulqa", 0)], DataFolder(tmp_path))


def test_answers_by_letter_are_those_by_number(benchmarks, tmp_path):
    shutil.copytree(benchmarks / "mmlu", tmp_path / "mmlu")
    for split in ("dev", "test"):
        path = tmp_path / f"mmlu/{split}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row | {"answer": "ABCD"[row["answer"]]}) + "\n" for row in rows))
    scores = [harness.run(Recorder(), Choice("mmlu", 1), DataFolder(folder)) for folder in (benchmarks, tmp_path)]
    assert scores[0].items == scores[1].items and 1 in scores[0].items


def test_a_score_knows_its_files(benchmarks, tmp_path):
    shutil.copytree(benchmarks, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "piqa/validation.jsonl"
    path.write_text(path.read_text().replace('"label": 0', '"label": 1'))
    for name in ("piqa", "sciq"):
        ours, theirs = (
            harness.run(Recorder(), Choice(name, 0), DataFolder(folder)) for folder in (benchmarks, tmp_path)
        )
        assert ours.data == TASKS[name].digest(DataFolder(benchmarks))
        assert (ours.data == theirs.data) == (ours.fingerprint == theirs.fingerprint) == (name == "sciq")


@pytest.mark.parametrize(
    ("task", "likelihood", "share"), [("piqa", math.nan, "4 of its 4"), ("truthfulqa", -1e9, "2 of its 2")]
)
def test_a_model_without_numbers_is_one_sentence(benchmarks, task, likelihood, share):
    """Of NaN the harness makes an answer; where all answers' probabilities are 0, mc2 is 0 / 0."""
    with pytest.raises(UserError, match=f"^{task}: the model gives no numbers for {share} items"):
        harness.run(Recorder(lambda context, answer: likelihood), Choice(task, 0), DataFolder(benchmarks))


def test_code_is_run_by_the_metric_from_the_hub_only(benchmarks, monkeypatch):
    """The harness's code tasks take their metric from the hub: without it, a sentence; with one, its verdict."""
    import evaluate as metrics

    def nowhere(name):
        raise FileNotFoundError(name)

    class Judge:
        def compute(self, references, predictions, k):
            assert os.environ["HF_ALLOW_CODE_EVAL"] == "1"
            passed = [sum("+ 1" in text for text in texts) / len(texts) for texts in predictions]
            return {f"pass@{n}": sum(passed) / len(passed) for n in k}, None

    data = DataFolder(benchmarks)
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")
    monkeypatch.setattr(metrics, "load", nowhere)
    for name in ("humaneval", "mbpp"):
        with pytest.raises(UserError, match="code_eval"):
            harness.run(Recorder(), Choice(name, 0), data)
    monkeypatch.setattr(metrics, "load", lambda name: Judge())
    model = Recorder(writes=" 1")
    assert harness.run(model, Choice("humaneval", 0), data).items == (1,) * 4
    assert model.asked[0][0] == "def f():\n    return 0 +"
    assert len(harness.run(model, Choice("mbpp", 3), data).items) == 2  # tasks 11 to 510
