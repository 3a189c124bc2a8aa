"""`turbosparse eval` as a user runs it: in a process of its own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from benchmark_files import write_benchmarks

import turbosparse
from turbosparse.evaluate.scores import Scores, TaskScore

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(turbosparse.__file__).parents[1]), "COLUMNS": "160"}
ENVIRONMENT.pop("TURBOSPARSE_EVAL_DATA", None)
PATIENCE = 120


def turbo(*arguments: object, code: int = 0, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run `turbosparse eval`; the exit code must be `code`, and a mistake one sentence."""
    command = [sys.executable, "-m", "turbosparse", "eval", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT | changes, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    if code == 2:
        assert done.stderr.startswith("turbosparse: ") and done.stderr.count("\n") == 1 and not done.stdout
    return done


@pytest.fixture(scope="module")
def sparse(tiny_gguf) -> Path:
    return tiny_gguf("llama", "drelu", "f32")


def test_scores_of_a_file_and_of_its_folder(sparse, tiny_folder, benchmarks, tmp_path):
    tasks = ("--tasks", "piqa,arc_easy", "--data-dir", benchmarks)
    done = turbo(sparse, *tasks, "--compute", "f32", "--json", "--output", tmp_path / "file.json")
    record = json.loads(done.stdout)
    assert done.stderr == ""
    assert (record["model"], record["mode"]) == (str(sparse), "exact")
    assert [row["task"] for row in record["tasks"]] == ["piqa", "arc_easy"]
    for row in record["tasks"]:
        assert row.keys() == {"task", "metric", "value", "stderr", "n", "shots"}
        assert row["metric"] == "acc_norm" and row["n"] == 4 and row["shots"] == 0
    assert record["average"] == pytest.approx(sum(row["value"] for row in record["tasks"]) / 2)
    folder = tiny_folder("llama", "drelu")
    turbo(folder, *tasks, "--batch", 2, "--output", tmp_path / "folder.json")
    both = json.loads(turbo(tmp_path / "file.json", "--against", tmp_path / "folder.json", "--json").stdout)
    assert both["control"] == {"model": str(folder), "mode": "hf"}
    for row in (*both["tasks"], both):
        assert row["difference"] == row["difference_stderr"] == 0 and row["against"] >= 0
    shown = turbo(tmp_path / "file.json", "--against", tmp_path / "folder.json", "--tasks", "arc_easy").stdout
    assert "arc_easy" in shown and "piqa" not in shown and "+0.00 ± 0.00" in shown and "average" in shown


def test_items_of_shared_gates_are_the_same_in_file_and_folder(tiny_gguf, tiny_folder, benchmarks, tmp_path):
    """TruthfulQA's are probabilities, which tell gates that serve the wrong neurons apart where answers may not."""
    arguments = ("--tasks", "piqa,truthfulqa", "--data-dir", benchmarks, "--compute", "f32", "--output")
    file, folder = tiny_gguf("llama", "drelu", "f32", 2), tiny_folder("llama", "drelu", 2)
    turbo(file, *arguments, tmp_path / "a.json", "--against", folder)
    ours, theirs = (Scores.load(tmp_path / name) for name in ("a.json", "a.against.json"))
    assert (ours.mode, theirs.mode) == ("exact", "hf")
    for mine, other in zip(ours.tasks, theirs.tasks, strict=True):
        assert mine.items == pytest.approx(other.items, rel=1e-3), mine.task
    assert 0 < ours.tasks[1].items[0] < 1


def test_dtype_of_a_folder_and_data_from_the_environment(tiny_folder, benchmarks):
    arguments = (tiny_folder("llama"), "--tasks", "piqa", "--limit", 2, "--dtype", "bfloat16", "--json")
    record = json.loads(turbo(*arguments, TURBOSPARSE_EVAL_DATA=str(benchmarks)).stdout)
    assert record["mode"] == "hf" and record["tasks"][0]["n"] == 2


def test_a_run_goes_on_where_it_was_stopped(sparse, benchmarks, tmp_path):
    out = tmp_path / "scores.json"
    arguments = (sparse, "--data-dir", benchmarks, "--output", out)
    turbo(*arguments, "--tasks", "piqa")
    record = json.loads(out.read_text())
    record["tasks"][0]["items"] = [0.25] * 4  # what no model scores: it is kept, so the task was not run again
    out.write_text(json.dumps(record))
    done = turbo(*arguments, "--tasks", "sciq,piqa", "--json")
    assert "piqa" in done.stderr
    shown = json.loads(done.stdout)
    assert [(row["task"], row["value"] == 0.25) for row in shown["tasks"]] == [("sciq", False), ("piqa", True)]
    assert [row["task"] for row in json.loads(out.read_text())["tasks"]] == ["piqa", "sciq"]
    other = shutil.copytree(benchmarks, tmp_path / "other")
    labels = (other / "piqa/validation.jsonl").read_text().replace('"label": 0', '"label": 1')
    (other / "piqa/validation.jsonl").write_text(labels)
    elsewhere = (*arguments, "--data-dir", other, "--tasks")
    assert "scores of piqa on other files; name a new file" in turbo(*elsewhere, "piqa", code=2).stderr
    assert "sciq already" in turbo(*elsewhere, "sciq").stderr
    assert "name a new file" in turbo(*arguments, "--tasks", "boolq", "--limit", 1, code=2).stderr
    os.utime(sparse)
    assert "another model" in turbo(*arguments, "--tasks", "boolq", code=2).stderr


def test_two_models_in_one_run(sparse, tiny_gguf, tiny_folder, benchmarks, tmp_path):
    control = tiny_gguf("llama", "dense", "f32")
    arguments = ("--tasks", "piqa,boolq", "--data-dir", benchmarks, "--against", control)
    with_folder = (
        *arguments[:-1],
        tiny_folder("llama"),
        "--mode",
        "dense",
        "--batch",
        4,
    )  # one option for each of them
    record = json.loads(turbo(sparse, *arguments, "--output", tmp_path / "a.json", "--json").stdout)
    assert record["control"] == {"model": str(control), "mode": "dense"}
    assert {"against", "difference", "difference_stderr"} <= record.keys() & record["tasks"][0].keys()
    kept = json.loads((tmp_path / "a.against.json").read_text())
    assert kept["model"] == str(control) and kept["average"] == record["against"]
    saved = (tmp_path / "a.json", "--against", tmp_path / "a.against.json", "--json")
    assert json.loads(turbo(*saved).stdout) == record
    assert json.loads(turbo(sparse, *with_folder, "--json").stdout)["control"]["mode"] == "hf"


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_keeps_the_tasks_that_are_done(sparse, tmp_path):
    write_benchmarks(tmp_path / "data", copies=10_000)
    (tmp_path / "data/piqa/validation.jsonl").write_text(
        (tmp_path / "data/piqa/validation.jsonl").read_text().split("\n")[0] + "\n"
    )
    out = tmp_path / "scores.json"
    command = [sys.executable, "-m", "turbosparse", "eval", sparse, "--tasks", "piqa,hellaswag", "--output", out]
    command += ["--data-dir", tmp_path / "data"]
    pipe = subprocess.PIPE
    child = subprocess.Popen([*map(str, command)], stdout=pipe, stderr=pipe, env=ENVIRONMENT)
    end = time.monotonic() + PATIENCE
    while not out.exists() and child.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, error = child.communicate(timeout=PATIENCE)
    assert child.returncode == 130 and b"Traceback" not in error
    assert [row["task"] for row in json.loads(out.read_text())["tasks"]] == ["piqa"]


BAD = {
    "unknown task": (["{sparse}", "--tasks", "piqa,piqqa"], "--tasks piqqa: unknown; the tasks are arc_easy"),
    "code": (["{sparse}", "--tasks", "humaneval"], "--allow-code"),
    "no data": (["{sparse}"], "--data-dir or TURBOSPARSE_EVAL_DATA"),
    "no such data": (["{sparse}", "--data-dir", "nowhere"], "--data-dir nowhere is not a folder"),
    "missing file": (["{sparse}", "--data-dir", "{empty}", "--tasks", "piqa"], "holds piqa/validation.jsonl"),
    "no model": (["nowhere.gguf", "--data-dir", "{data}"], "nowhere.gguf"),
    "no folder of a model": (["{empty}", "--data-dir", "{data}"], "no config.json"),
    "mode of a folder": (["{folder}", "--data-dir", "{data}", "--mode", "dense"], "export it first"),
    "exact on dense": (["{dense}", "--data-dir", "{data}", "--mode", "exact"], "mode exact is not possible"),
    "batch of a file": (["{sparse}", "--data-dir", "{data}", "--batch", "2"], "--batch is for Hugging Face folders"),
    "dtype of a file": (["{sparse}", "--data-dir", "{data}", "--dtype", "float16"], "--dtype is for Hugging Face"),
    "output is no .json": (["{sparse}", "--output", "{empty}/x.txt"], "ends in .json"),
    "output in no folder": (["{sparse}", "--output", "{empty}/no/x.json"], "does not exist"),
    "no scores": (["{scores}", "--against", "{scores}"], "does not hold scores"),
    "no such scores": (["nope.json", "--against", "nope2.json"], "nope.json does not exist"),
    "no such control": (["{good}", "--tasks", "piqa", "--against", "typo.json"], "typo.json does not exist"),
    "limit of scores": (["{good}", "--limit", "1"], "--limit is for evaluating a model"),
    "mode of scores": (["{good}", "--mode", "predicted"], "--mode is for evaluating a model"),
    "compute of scores": (["{good}", "--against", "{good}", "--compute", "f32"], "--compute is for evaluating a model"),
    "output of scores": (["{good}", "--output", "{empty}/x.json"], "--output is for evaluating a model"),
    "control without the task": (["{sparse}", "--tasks", "piqa", "--against", "nowhere.json"], "nowhere.json"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_sentence(case, sparse, tiny_gguf, tiny_folder, benchmarks, tmp_path):
    (tmp_path / "scores.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    names = {"sparse": sparse, "dense": tiny_gguf("llama", "dense", "f32"), "folder": tiny_folder("llama")}
    Scores("m", "exact", {}, [TaskScore("piqa", "acc_norm", 0, "f", (1.0, 0.0))]).save(tmp_path / "good.json")
    names |= {"good": tmp_path / "good.json"}
    names |= {"data": benchmarks, "empty": tmp_path / "empty", "scores": tmp_path / "scores.json"}
    arguments, part = BAD[case]
    if case == "control without the task":
        arguments = [*arguments, "--data-dir", "{data}"]
    assert part in turbo(*[argument.format(**names) for argument in arguments], code=2).stderr


def test_names_in_saved_scores_are_shown_as_they_are(tmp_path):
    name = "[/a] [red]b \x1b[2J :x: \ud800"
    Scores(name, name, {}, [TaskScore(name, name, 0, "f", (1.0, 0.0))]).save(tmp_path / "a.json")
    shown = turbo(tmp_path / "a.json", "--against", tmp_path / "a.json", COLUMNS="400").stdout
    assert shown.count(r"[/a] [red]b \x1b[2J :x: \ud800") == 6 and "\x1b" not in shown


def test_a_missing_extra_is_one_sentence(sparse, benchmarks):
    script = "import sys; sys.modules['lm_eval'] = None; from turbosparse.cli import main; main()"
    command = [sys.executable, "-c", script, "eval", str(sparse), "--data-dir", str(benchmarks)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 2 and "pip install 'turbosparse[eval]'" in done.stderr, done.stderr
