"""Every command on tiny real models, as a user runs it: in a process of its own, its output parsed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from factories import make_folder
from folders import copy_folder
from gguf import GGMLQuantizationType as Type

import turbosparse
from turbosparse.predict.folder import save_folder
from turbosparse.predict.write import StoredPredictor

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(turbosparse.__file__).parents[1]), "COLUMNS": "100"}


def turbo(*arguments: object, stdin: str = "", code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command line; the exit code must be `code`."""
    command = [sys.executable, "-m", "turbosparse", *map(str, arguments)]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def turbo_json(*arguments: object, stdin: str = "") -> dict:
    return json.loads(turbo(*arguments, "--json", stdin=stdin).stdout)


@pytest.fixture(scope="module")
def sparse(tiny_gguf) -> Path:
    return tiny_gguf("llama", "drelu", "q8_0")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"The {n} quick brown foxes jump over {n} dogs."}) + "\n" for n in range(9))
    )
    return path


def test_help_is_quick_to_import_and_lists_every_stage():
    script = (
        "import sys, turbosparse.cli.app; print([m for m in ('numpy', 'torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    assert done.stdout.strip() == "[]"
    shown = turbo("--help").stdout
    for stage in (
        "convert",
        "train",
        "train-predictors",
        "analyze",
        "export",
        "import",
        "info",
        "run",
        "chat",
        "perplexity",
        "eval",
        "bench",
    ):
        assert stage in shown
    assert turbosparse.__version__ in turbo("--version").stdout


def test_a_run_imports_nothing_that_it_can_do_without(sparse):
    heavy = ("torch", "transformers", "huggingface_hub", "jinja2", "rich.progress", "wrapt", "zstandard")
    script = (
        f"import atexit, sys; heavy = {heavy};"
        "atexit.register(lambda: print([m for m in heavy if m in sys.modules], file=sys.stderr));"
        "from turbosparse.cli import main; main()"
    )
    command = [sys.executable, "-c", script, "run", str(sparse), "-p", "The fox", "-n", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=True)
    assert done.stderr.splitlines()[-1] == "[]"


def test_info(sparse):
    record = turbo_json("info", sparse)
    assert record["architecture"] == "turbosparse" and record["activation"] == "drelu" and record["quant"] == "q8_0"
    assert record["file_bytes"] == sparse.stat().st_size and record["predictor"] is None and record["experts"] == 0
    assert {"layers", "hidden_size", "ffn_size", "parameters"} <= record.keys()
    assert "turbosparse" in turbo("info", sparse).stdout


@pytest.mark.parametrize("mirrored", [False, True])
def test_shared_gates_and_ups_in_every_command(sparse, tmp_path, mirrored):
    path = tmp_path / "m.gguf"
    turbo("export", make_folder(tmp_path / "hf", "llama", "drelu", neurons_per_gate=2, mirrored_ups=mirrored), path)
    assert turbo_json("info", path)["mirrored_ups"] == mirrored
    assert turbo_json("info", path)["neurons_per_gate"] == 2 and "neurons per gate" in turbo("info", path).stdout
    assert turbo_json("info", sparse)["neurons_per_gate"] == 1
    arguments = ("run", path, "-p", "the quick", "-n", 8, "--ignore-eos", "--mode")
    dense, exact = (turbo_json(*arguments, mode) for mode in ("dense", "exact"))
    assert dense["text"] == exact["text"] and 0.6 < exact["sparsity"] < 0.9
    bench = turbo_json("bench", path, "--repeats", 1, "-n", 4)
    assert [run["mode"] for run in bench["runs"]][:2] == ["dense", "exact"]


def test_a_name_is_neither_markup_nor_obeyed(sparse, tmp_path):
    content, name = sparse.read_bytes(), b"[/a]\x1b[2J:x:"
    assert content.count(b"llama-drelu") == 1 and len(name) == len(b"llama-drelu")
    (tmp_path / "m.gguf").write_bytes(content.replace(b"llama-drelu", name))
    assert r"[/a]\x1b[2J:x:" in turbo("info", tmp_path / "m.gguf").stdout
    assert turbo_json("info", tmp_path / "m.gguf")["name"] == name.decode()


def test_a_mixture_of_experts_in_every_command(tiny_gguf, text):
    path = tiny_gguf("mixtral", "drelu", "q4_0")
    record = turbo_json("info", path)
    assert (record["family"], record["experts"], record["experts_used"]) == ("mixtral", 5, 2)
    arguments = ("run", path, "-p", "the quick", "-n", 8, "--ignore-eos", "--mode")
    dense, exact = (turbo_json(*arguments, mode) for mode in ("dense", "exact"))
    assert dense["text"] == exact["text"] and 0.6 < exact["sparsity"] < 0.9
    report = turbo_json("analyze", path, "--data", text, "--limit", 60)
    assert [(layer["layer"], layer["expert"]) for layer in report["layers"]] == [(n // 5, n % 5) for n in range(10)]
    assert sum(layer["routed"] for layer in report["layers"]) == pytest.approx(2 * 2)
    assert "expert" in turbo("analyze", path, "--data", text, "--limit", 60).stdout
    bench = turbo_json("bench", path, "--dense-twin", tiny_gguf("mixtral"), "--repeats", 1, "-n", 4, "--batch", "2")
    assert [run["mode"] for run in bench["runs"]] == ["dense", "exact", "dense-twin"] and len(bench["batches"]) == 2


def test_to_powerinfer_and_back(tmp_path):
    folder = make_folder(tmp_path / "hf", "llama", "drelu", intermediate_size=1024)
    theirs, ours = tmp_path / "theirs.gguf", tmp_path / "ours.gguf"
    exported = turbo_json("export", folder, theirs, "--format", "powerinfer")
    assert (exported["architecture"], exported["quant"]) == ("bamboo", "q4_0")
    imported = turbo_json("import", theirs, ours, "--threshold", -1)
    assert imported["architecture"] == "turbosparse" and imported["file_bytes"] == ours.stat().st_size
    assert turbo_json("info", theirs)["predictor"] == turbo_json("info", ours)["predictor"] is not None
    options = ["-p", "the quick", "-n", 8, "--ignore-eos", "--mode", "predicted"]
    assert turbo_json("run", theirs, *options)["text"] == turbo_json("run", ours, *options)["text"]
    assert str(ours) in turbo("import", folder, ours, "--quant", "q8_0").stderr


def test_run_is_the_same_in_every_mode_and_from_stdin(sparse):
    options = ["-n", 12, "--ignore-eos", "--temperature", 0.9, "--seed", 5]
    dense = turbo_json("run", sparse, "-p", "the quick", "--mode", "dense", *options)
    exact = turbo_json("run", sparse, "--mode", "exact", "--threads", 1, *options, stdin="the quick")
    assert dense["text"] == exact["text"] and dense["tokens"] == exact["tokens"] == 12
    assert (dense["mode"], exact["mode"]) == ("dense", "exact")
    assert dense["sparsity"] == exact["sparsity"] and 0 < exact["sparsity"] < 1
    assert {"prompt_tokens", "prefill_tok_s", "decode_tok_s"} <= dense.keys()
    streamed = turbo("run", sparse, "-p", "the quick", *options)
    assert streamed.stdout == exact["text"] + "\n" and "[exact]" in streamed.stderr


def test_chat_reads_piped_messages_and_remembers(sparse):
    done = turbo(
        "chat", sparse, "-n", 4, "--system", "Be brief.", stdin="hello\nand more\n/reset\nhello\n/exit\nnot read\n"
    )
    answers = done.stdout
    assert len(answers) > 0 and done.stderr == ""
    alone = turbo("chat", sparse, "-n", 4, "--system", "Be brief.", stdin="hello\n").stdout
    assert answers.startswith(alone) and answers.endswith(alone)


def test_a_conversation_that_does_not_fit_is_an_error(sparse):
    done = turbo("chat", sparse, "--ctx", 16, stdin="a message with more tokens than fit into this context\n", code=2)
    assert "does not fit the context of 16" in done.stderr


@pytest.mark.parametrize("group", [1, 3])
def test_analyze_gives_the_same_figures_for_a_folder_and_for_its_file(tiny_folder, tiny_gguf, text, group):
    file = tiny_gguf("llama", "drelu", "f32", group)
    ours = turbo_json("analyze", file, "--data", text, "--compute", "f32")
    theirs = turbo_json("analyze", tiny_folder("llama", "drelu", group), "--data", text)
    assert ours["neurons"] == theirs["neurons"] == 96
    assert ours["tokens"] == theirs["tokens"] > 50
    assert ours["sparsity"] == pytest.approx(theirs["sparsity"], abs=1e-4)
    for a, b in zip(ours["layers"], theirs["layers"], strict=True):
        assert {"layer", "h", "gate", "up"} <= a.keys()
        assert a.pop("most_missed") == b.pop("most_missed") == []  # it has no predictors
        assert a == pytest.approx(
            b, abs=2e-3 * ours["neurons"]
        )  # counts of hot and cold neurons may differ by rounding
        assert [a[key] for key in ("h", "gate", "up")] == pytest.approx(
            [b[key] for key in ("h", "gate", "up")], abs=1e-3
        )
    assert "mean" in turbo("analyze", file, "--data", text, "--limit", 40).stdout


def test_perplexity_of_a_folder_and_its_file_agree(tiny_folder, tiny_gguf, text):
    arguments = ["perplexity", tiny_gguf("qwen3", "drelu", "f32"), "--data", text, "--compute", "f32"]
    ours = turbo_json(*arguments)
    theirs = turbo_json("perplexity", tiny_folder("qwen3", "drelu"), "--data", text)
    assert ours["tokens"] == theirs["tokens"] and ours["mode"] == "exact"
    assert ours["nats_per_token"] == pytest.approx(theirs["nats_per_token"], abs=1e-4)
    dense = turbo_json(
        "perplexity", tiny_gguf("qwen3", "drelu", "f32"), "--data", text, "--compute", "f32", "--mode", "dense"
    )
    assert dense["perplexity"] == ours["perplexity"]


def test_bench(sparse, tiny_gguf, monkeypatch):
    twin = tiny_gguf("llama", "dense", "q8_0")
    record = turbo_json("bench", sparse, "--dense-twin", twin, "-n", 4, "--prompt-tokens", 8, "--repeats", 2)
    assert [run["mode"] for run in record["runs"]] == ["dense", "exact", "dense-twin"]
    assert record["machine"]["read_gb_s"] is None or record["machine"]["read_gb_s"] > 0.1
    assert {"cpu", "isa", "threads"} <= record["machine"].keys()
    for run in record["runs"]:
        assert run["prefill_tok_s"] > 0 and run["decode_tok_s"] > 0 and run["bytes_per_token"] > 0
    dense, exact, twin_run = record["runs"]
    assert exact["bytes_per_token"] < dense["bytes_per_token"]
    # Of equal size, but each reads as many logits as its text needs.
    assert twin_run["bytes_per_token"] == pytest.approx(dense["bytes_per_token"], rel=0.25)
    assert record["speedup"]["exact"] == pytest.approx(exact["decode_tok_s"] / dense["decode_tok_s"])
    assert record["speedup"]["predicted"] is None and record["batches"] == []


def test_bench_of_several_sequences_together(sparse):
    options = ["-n", 4, "--prompt-tokens", 1, "--repeats", 1, "--batch", "1,3"]
    batches = turbo_json("bench", sparse, *options)["batches"]
    assert [(each["mode"], each["sequences"]) for each in batches] == [
        (mode, size) for size in (1, 3) for mode in ("dense", "exact")
    ]
    read = {(each["mode"], each["sequences"]): each["bytes_per_step"] for each in batches}
    # Every weight once, but a row of the embedding for each sequence.
    assert read["dense", 1] < read["dense", 3] < 1.01 * read["dense", 1]
    assert read["exact", 1] < read["exact", 3] < read["dense", 3]
    assert all(each["decode_tok_s"] > 0 for each in batches)
    assert "together" in turbo("bench", sparse, *options).stdout


def test_bench_of_phases(sparse):
    options = ["-n", 4, "--prompt-tokens", 2, "--repeats", 1, "--phases"]
    phases = turbo_json("bench", sparse, *options)["phases"]
    assert {phase["mode"] for phase in phases} == {"dense", "exact"}
    assert {"qkv", "head", "up_open", "whole pass"} <= {phase["phase"] for phase in phases}
    assert "a token in exact mode" in turbo("bench", sparse, *options).stdout


def test_from_a_dense_folder_to_a_running_sparse_file(tiny_folder, tmp_path):
    converted = turbo_json("convert", tiny_folder("gemma3"), tmp_path / "sparse")
    assert converted["architecture"] == "turbosparse_gemma3_text"
    exported = turbo_json("export", tmp_path / "sparse", tmp_path / "out.gguf", "--quant", "q4_0")
    assert exported["quant"] == "q4_0" and exported["file_bytes"] == (tmp_path / "out.gguf").stat().st_size
    assert turbo_json("run", tmp_path / "out.gguf", "-p", "hi", "-n", 3, "--ignore-eos")["mode"] == "exact"


def test_an_export_takes_the_predictors_of_its_folder_along(tiny_folder, tmp_path):
    folder, out = copy_folder(tiny_folder("llama", "drelu"), tmp_path / "hf"), tmp_path / "out.gguf"
    matrices = np.ones((32, 64), np.float32), np.ones((96, 32), np.float32)
    save_folder(folder, [StoredPredictor.of(*matrices, (Type.F32, Type.F32)) for _ in range(2)])
    exported = turbo_json("export", folder, out)
    assert exported["output"] == str(out) and exported["file_bytes"] == out.stat().st_size
    assert turbo_json("info", out)["predictor"]["layers"] == 2
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "out.gguf"}


def test_demo(tiny_gguf, text, tmp_path):
    picture = tmp_path / "demo.svg"
    done = turbo("demo", "--model", tiny_gguf("llama", "drelu", "q4_0"), "--data", text, "--svg", picture)
    assert "same text" in done.stdout and "yes" in done.stdout and " NO" not in done.stdout
    assert picture.read_text().startswith("<svg")


BAD = {
    "missing file": (["run", "nowhere.gguf", "-p", "x"], "nowhere.gguf"),
    "not a GGUF": (["info", "{junk}"], "junk.gguf"),
    "truncated": (["run", "{truncated}", "-p", "x"], "truncated.gguf"),
    "a folder": (["run", "{folder}", "-p", "x"], "turbosparse export"),
    "exact on dense": (["run", "{dense}", "-p", "x", "--mode", "exact"], "mode exact"),
    "prompt too long": (["run", "{sparse}", "-p", "word " * 50, "--ctx", "20"], "do not fit the context of 20"),
    "a cache for other heads": (["run", "{sparse}", "-p", "x", "--kv-cache", "q8_0"], "--kv-cache q8_0"),
    "choosing while reading": (["perplexity", "{sparse}", "--data", "{text}", "--mode", "auto-predicted"], "auto-pred"),
    "no number of sequences": (["bench", "{sparse}", "--batch", "1,x"], "--batch 1,x"),
    "empty prompt": (["run", "{sparse}", "-p", ""], "prompt is empty"),
    "not JSONL": (["perplexity", "{sparse}", "--data", "{broken}"], "broken.jsonl"),
    "missing data": (["analyze", "{sparse}", "--data", "nothing.txt"], "nothing.txt"),
    "no config": (["convert", "{empty}", "{new}"], "config.json"),
    "export of a dense model": (["export", "{folder}", "{new}", "--format", "powerinfer"], "drelu and reglu"),
    "a type for a file": (["export", "{sparse}", "{new}", "--format", "powerinfer", "--quant", "f16"], "--quant f16"),
    "import of our own file": (["import", "{sparse}", "{new}"], "PWRI"),
    "export without config": (["export", "{empty}", "{new}"], "config.json"),
    "out exists": (["convert", "{folder}", "{empty}"], "exists already"),
    "no recipe": (["train", "nothing.yaml"], "nothing.yaml"),
    "unknown recipe key": (["train", "{recipe}"], "modle"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_sentence_and_exit_code_2(case, tiny_gguf, tiny_folder, sparse, tmp_path):
    names = {"sparse": sparse, "dense": tiny_gguf("llama", "dense", "q8_0"), "folder": tiny_folder("llama")}
    names |= {"junk": tmp_path / "junk.gguf", "truncated": tmp_path / "truncated.gguf", "new": tmp_path / "new"}
    names |= {"broken": tmp_path / "broken.jsonl", "empty": tmp_path / "empty", "recipe": tmp_path / "recipe.yaml"}
    names["text"] = tmp_path / "text.txt"
    names["text"].write_text("some words to read")
    names["junk"].write_bytes(b"no model at all")
    names["truncated"].write_bytes(sparse.read_bytes()[:-1000])
    names["broken"].write_text('{"text": "fine"}\nnot json\n')
    names["empty"].mkdir()
    names["recipe"].write_text("modle: x\n")
    arguments, part = BAD[case]
    done = turbo(*[argument.format(**names) for argument in arguments], code=2)
    sentence = done.stderr.strip()
    assert sentence.startswith("turbosparse: ") and part in sentence and "\n" not in sentence, sentence
    assert done.stdout == "" and not names["new"].exists()


def test_a_wrong_option_is_exit_code_2(sparse):
    assert "--mode" in turbo("run", sparse, "-p", "x", "--mode", "fast", code=2).stderr


def test_synth_writes_a_model_that_bench_calls_synthetic(tmp_path):
    out = tmp_path / "small.gguf"
    record = turbo_json("synth", out, "--shape", "smollm2-135m", "--layers", 3)
    measured = record["measured"]
    assert measured["sparsity"] == pytest.approx(0.9, abs=0.02) and measured["gate_rate"] == pytest.approx(
        0.25, abs=0.03
    )
    assert measured["selected"] == pytest.approx(1.2, abs=0.06) and 0.9 < measured["recall"] <= 1
    assert measured["predictor_share"] == pytest.approx(0.06, abs=0.01)
    assert record["file_bytes"] == out.stat().st_size
    bench = turbo_json("bench", out, "--repeats", 1, "-n", 4, "--prompt-tokens", 8)
    assert bench["synthetic"] and all(run["synthetic"] for run in bench["runs"])
    modes = {run["mode"]: run for run in bench["runs"]}
    assert list(modes) == ["dense", "exact", "predicted"] and bench["speedup"]["predicted"] > 0
    assert modes["predicted"]["bytes_per_token"] < modes["exact"]["bytes_per_token"]
    assert 0.08 < modes["predicted"]["selected"] < 0.2 and modes["exact"]["selected"] is None
    assert "synthetic" in turbo("bench", out, "--repeats", 1, "-n", 4, "--prompt-tokens", 8).stdout


def test_synth_mirrors_ups(tmp_path):
    out = tmp_path / "small.gguf"
    shape = ("--shape", "smollm2-135m", "--layers", 2, "--neurons-per-gate", 2, "--mirrored-ups")
    record = turbo_json("synth", out, *shape, "--gate-rate", 0.3)
    measured = record["measured"]
    assert record["mirrored_ups"] and turbo_json("info", out)["mirrored_ups"]
    assert (measured["gate_rate"], measured["sparsity"]) == pytest.approx((0.3, 0.85), abs=0.03)
    assert "give one of the two" in turbo("synth", out, *shape, "--gate-rate", 0.3, "--sparsity", 0.9, code=2).stderr


def test_predicted_mode_in_every_command(tmp_path, text):
    out = tmp_path / "small.gguf"
    turbo("synth", out, "--shape", "smollm2-135m", "--layers", 2)
    info = turbo_json("info", out)["predictor"]
    assert info["input"] == "normed" and info["layers"] == 2 and info["share"] == pytest.approx(0.06, abs=0.01)
    assert "of the FFN's bytes" in turbo("info", out).stdout
    run = turbo_json("run", out, "-p", "the quick", "-n", 6, "--ignore-eos", "--mode", "predicted")
    assert run["mode"] == "predicted" and 0 < run["selected"] < 0.3
    shown = turbo("run", out, "-p", "the quick", "-n", 6, "--ignore-eos", "--mode", "predicted").stderr
    assert "[predicted]" in shown and "selected" in shown
    auto = turbo_json("run", out, "-p", "the quick", "-n", 24, "--ignore-eos", "--mode", "auto-predicted")
    assert auto["mode"] == "predicted"
    half = turbo_json("run", out, "-p", "the quick", "-n", 24, "--ignore-eos", "--kv-cache", "q8_0")
    assert half["mode"] == "exact" and half["kv_cache_bytes"] / auto["kv_cache_bytes"] == pytest.approx(
        17 / 32, rel=0.01
    )
    perplexity = turbo_json("perplexity", out, "--data", text, "--mode", "predicted", "--limit", 40)
    exact = turbo_json("perplexity", out, "--data", text, "--mode", "exact", "--limit", 40)
    assert perplexity["mode"] == "predicted" and perplexity["tokens"] == exact["tokens"]
    assert perplexity["nats_per_token"] != exact["nats_per_token"]
    report = turbo_json("analyze", out, "--data", text, "--limit", 60)
    assert 0.05 < report["predictor"]["selected"] < 0.25 and 0.8 < report["predictor"]["recall"] <= 1
    assert report["layers"][1]["recall"] > 0.8
    assert "recall" in turbo("analyze", out, "--data", text, "--limit", 60).stdout
    plain = tmp_path / "plain.gguf"
    turbo("synth", plain, "--shape", "smollm2-135m", "--layers", 1, "--predictor-share", 0)
    assert turbo_json("info", plain)["predictor"] is None
    assert "mode predicted" in turbo("run", plain, "-p", "x", "--mode", "predicted", code=2).stderr
    assert "--selected" in turbo("synth", plain, "--shape", "smollm2-135m", "--selected", 0.5, code=2).stderr
