"""The card says what the run and the commands measured, and only a whole model goes to the hub."""

import json
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError
from typer.testing import CliRunner

from turbosparse.cli import publish
from turbosparse.cli.app import app
from turbosparse.errors import UserError
from turbosparse.publish import upload as upload_module

STAGES = [
    {"name": "warm", "objective": "layerwise", "teacher": "runs/adapt/1-adapt", "tokens": "4M", "learning_rate": 4e-3},
    {
        "name": "recover",
        "objective": "cross_entropy",
        "tokens": "100M",
        "learning_rate": 1e-3,
        "sparsity": {"target_rate": 0.1},
        "distillation": {"teacher": "runs/control/1-train", "share": 0.8},
    },
]
SCORES = {
    "tasks": [
        {"task": "piqa", "metric": "acc", "shots": 0, "value": 0.6712, "stderr": 0.011, "n": 1838}
        | {"against": 0.6731, "difference": -0.0019, "difference_stderr": 0.004}
    ],
    "average": 0.6712,
    "average_stderr": 0.011,
    "against": 0.6731,
    "difference": -0.0019,
    "difference_stderr": 0.004,
}
BENCH = {
    "machine": {"cpu": "A CPU", "threads": 2, "isa": "avx2"},
    "runs": [
        {"mode": "dense", "decode_tok_s": 100.04, "bytes_per_token": None},
        {"mode": "exact", "decode_tok_s": 150.0, "bytes_per_token": 65.5e6},
    ],
}


def _stage(folder: Path, ce: float, tokens: int, zeros: float | None = None) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({} if zeros is None else {"activation": "drelu"}))
    metrics = {"eval_web_ce": ce + 0.5, "eval_ce": ce}
    if zeros is not None:
        metrics |= {"eval_web_sparsity_h": zeros - 0.01, "eval_sparsity_h": zeros}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "log.jsonl").write_text(f'{{"step": 1, "tokens": 10}}\n{{"step": 2, "tokens": {tokens}}}\n')


def _recipe(model: str, sources: list[dict], stages: list[dict]) -> str:
    text = {"sources": sources, "validation": [{"domain": "web", "path": "$NOT_SET_ANYWHERE/held.jsonl"}]}
    return yaml.safe_dump({"model": model, "output": "$NOT_SET_ANYWHERE/run", "data": text, "stages": stages})


def _edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of two stages beside its control; the folder of the last stage."""
    sources = [{"domain": "web", "path": "/secret/place/*.jsonl"}]
    sources.append({"domain": "math", "dataset": "a/b", "max_tokens": "1M"})
    for name, stages in (("drelu", STAGES), ("control", [STAGES[1] | {"name": "train"}])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.yaml").write_text(_recipe("/secret/dense", sources, stages))
    _stage(tmp_path / "drelu" / "1-warm", 2.25, 4_000_000, 0.8)
    _stage(tmp_path / "drelu" / "2-recover", 1.6571, 100_000_000, 0.9042)
    _stage(tmp_path / "control" / "1-train", 1.6498, 104_000_000)
    (tmp_path / "drelu" / "2-recover" / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: o/base\n---\n")
    return tmp_path / "drelu" / "2-recover"


def _publish(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["publish", *map(str, words)])
    return result.exit_code, result.output


def test_the_card_holds_the_figures_of_the_run_and_of_the_commands(run, tmp_path):
    (tmp_path / "scores.json").write_text(json.dumps(SCORES))
    (tmp_path / "bench.json").write_text(json.dumps(BENCH))
    options = ["--control", tmp_path / "control" / "1-train", "--scores", tmp_path / "scores.json"]
    code, _ = _publish(run, *options, "--bench", tmp_path / "bench.json")
    assert code == 0
    card = ModelCard.load(run / "README.md")
    assert card.data.license == "apache-2.0" and card.data.base_model == "o/base"
    assert card.data.eval_results[0].metric_value == 67.12
    text = card.text
    assert "90.4 % of its FFN neurons" in text
    assert "| this model | 104.0M | `dense` | 2.1571 | 1.6571 |" in text
    assert "| SwiGLU control, same code and text | 104.0M | `dense` | 2.1498 | 1.6498 |" in text
    assert "| piqa | acc | 0 | 67.12 ± 1.10 | 67.31 | -0.19 ± 0.40 |" in text
    assert "| exact | 150.0 | 65.5 MB |" in text and "| dense | 100.0 | - |" in text
    assert "| recover | cross entropy | 100.0M | 0.001 | 90.0 % | control |" in text
    assert "- web: 50.0 %, local files" in text and "- math: 50.0 %, a/b" in text
    assert "secret" not in text  # a card names no path of the machine it was made on


def test_a_card_of_a_run_alone_leaves_out_what_was_not_measured(run):
    assert _publish(run)[0] == 0
    text = (run / "README.md").read_text()
    assert "## Sparsity" in text
    assert "## Benchmarks" not in text and "## Speed" not in text and "control, same code" not in text
    again = (run / "README.md").read_text()
    assert _publish(run)[0] == 0 and (run / "README.md").read_text() == again  # licence and base survive


def test_a_card_counts_the_run_that_this_one_went_on_from(run, tmp_path, monkeypatch):
    monkeypatch.setenv("WORK", str(tmp_path))
    chat = tmp_path / "chat" / "1-chat"
    _stage(chat, 1.66, 4_000_000, 0.9)
    stages = [{"name": "chat", "objective": "cross_entropy", "tokens": "4M", "learning_rate": 3e-4}]
    recipe = _recipe("${WORK}/drelu/2-recover", [{"domain": "chat", "path": "x"}], stages)
    (chat.parent / "recipe.yaml").write_text(recipe)
    assert _publish(chat)[0] == 0
    text = (chat / "README.md").read_text()
    assert "| this model | 108.0M | `dense` |" in text
    assert "| warm | " in text and "| recover | " in text and "| chat | " in text


def test_a_recipe_is_read_as_training_reads_it(run):
    _edit(run.parent / "recipe.yaml", "learning_rate: 0.001", "learning_rate: 1e-3")
    assert isinstance(yaml.safe_load((run.parent / "recipe.yaml").read_text())["stages"][1]["learning_rate"], str)
    assert _publish(run)[0] == 0
    assert "| recover | cross entropy | 100.0M | 0.001 |" in (run / "README.md").read_text()


@pytest.mark.parametrize(
    ("activation", "tags", "said"),
    [
        ("drelu", ["turbosparse", "drelu", "activation-sparsity"], "2406.05955), `relu(gate) * relu(up)`"),
        ("reglu", ["turbosparse", "reglu", "activation-sparsity"], "2002.05202), `relu(gate) * up`"),
        (None, ["turbosparse"], "it is a dense model"),
    ],
)
def test_a_card_names_the_activation_that_the_model_has(run, activation, tags, said):
    (run / "config.json").write_text(json.dumps({"activation": activation}))
    assert _publish(run)[0] == 0
    card = ModelCard.load(run / "README.md")
    assert card.data.tags == tags and said in card.text
    assert ("swapping" in card.text) == ("import turbosparse" in card.text) == (activation is not None)


def test_a_run_that_goes_on_from_itself_is_one_sentence(run):
    _edit(run.parent / "recipe.yaml", "/secret/dense", str(run))
    code, printed = _publish(run)
    assert code == 2 and "from its own" in " ".join(printed.split())


class _Hub:
    """Stands in for the hub's client and keeps what it is asked to do."""

    calls: ClassVar[list[tuple[str, dict]]] = []

    def create_repo(self, repository, **options):
        self.calls.append(("create", {"repository": repository, **options}))
        return f"https://hub/{repository}"

    def upload_folder(self, **options):
        self.calls.append(("folder", options))

    def upload_file(self, **options):
        self.calls.append(("file", options))


def test_a_model_goes_to_the_hub_with_its_card_and_its_files(run, tmp_path, monkeypatch):
    monkeypatch.setattr(_Hub, "calls", [])
    monkeypatch.setattr(upload_module, "HfApi", _Hub)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    code, printed = _publish(run, "--to", "me/sparse", "--private", "--gguf", tmp_path / "m.gguf")
    assert code == 0 and "https://hub/me/sparse" in printed
    (_, created), (_, folder), (_, file) = _Hub.calls
    assert created == {"repository": "me/sparse", "private": True, "exist_ok": True}
    assert folder["folder_path"] == run and "*.safetensors" in folder["allow_patterns"]
    assert file["path_in_repo"] == "m.gguf"
    assert "turbosparse run m.gguf" in (run / "README.md").read_text()


def test_all_parts_of_a_file_go_to_the_hub(run, tmp_path, monkeypatch):
    monkeypatch.setattr(_Hub, "calls", [])
    monkeypatch.setattr(upload_module, "HfApi", _Hub)
    parts = [tmp_path / f"m-0000{part}-of-00002.gguf" for part in (1, 2)]
    for part in parts:
        part.write_bytes(b"GGUF")
    assert _publish(run, "--to", "me/sparse", "--gguf", parts[1], "--gguf", parts[0])[0] == 0
    assert [options["path_in_repo"] for kind, options in _Hub.calls if kind == "file"] == [part.name for part in parts]
    assert "turbosparse run m-00001-of-00002.gguf" in (run / "README.md").read_text()


def test_nobody_logged_in_is_one_sentence(run, monkeypatch):
    def refuse(self, repository, **options):
        raise LocalTokenNotFoundError("no token")

    monkeypatch.setattr(_Hub, "create_repo", refuse)
    monkeypatch.setattr(upload_module, "HfApi", _Hub)
    code, printed = _publish(run, "--to", "me/sparse")
    assert code == 2 and "hf auth login" in printed


def _recipe_edit(old: str, new: str):
    return lambda run: _edit(run.parent / "recipe.yaml", old, new)


def _holds(name: str, text: str):
    return lambda run: (run / name).write_text(text)


SCORES_ALONE, SCORES_FIRST = ["--scores", "s.json"], ["--scores", "s.json", "--bench", "b.json"]


@pytest.mark.parametrize(
    ("spoil", "options", "word"),
    [
        (lambda run: (run.parent / "recipe.yaml").unlink(), [], "recipe.yaml"),
        (_recipe_edit("name: recover", "name: other"), [], "recipe.yaml"),
        (_recipe_edit("stages:", "stages: ["), [], "recipe.yaml"),
        (_recipe_edit("model: /secret/dense", "model: " + "[" * 2000), [], "recipe.yaml"),
        (_recipe_edit("sources:", "sources: [a]\n  unused:"), [], "data.sources.0"),
        (_recipe_edit("domain: math", "domain: math\n    weight: 0"), [], "weight"),
        (_recipe_edit("learning_rate: 0.001", "learning_rate: fast"), [], "learning_rate"),
        (_recipe_edit("tokens: 100M", "tokens: " + "9" * 400 + "M"), [], "recipe.yaml"),
        (lambda run: (run / "config.json").unlink(), [], "config.json"),
        (_holds("config.json", '{"activation": ["drelu"]}'), [], "config.json"),
        (_holds("metrics.json", "[1"), [], "metrics.json"),
        (_holds("metrics.json", '{"eval_ce": "x"}'), [], "'eval_ce' is not a finite number"),
        (_holds("metrics.json", '{"eval_ce": NaN}'), [], "'eval_ce' is not a finite number"),
        (_holds("metrics.json", '{"eval_ce": 1' + "0" * 400 + "}"), [], "'eval_ce' is not a finite number"),
        (_holds("metrics.json", "[" * 100_000), [], "metrics.json"),
        (_holds("metrics.json", '{"eval_\\ud800_ce": 1}'), [], "surrogate"),
        (_holds("log.jsonl", "{}"), [], "log.jsonl"),
        (_holds("log.jsonl", '{"tokens": Infinity}'), [], "log.jsonl"),
        (_holds("log.jsonl", "[" * 100_000), [], "log.jsonl"),
        (lambda run: (run / "README.md").unlink(), ["--to", "a/b"], "--license"),
        (lambda run: None, ["--gguf", "absent.gguf"], "absent.gguf"),
        (_holds("s.json", "{}"), SCORES_ALONE, "--scores"),
        (_holds("s.json", json.dumps(SCORES | {"tasks": [{"task": []}]})), SCORES_ALONE, "--scores"),
        (_holds("s.json", json.dumps(SCORES | {"average": 10**400})), SCORES_ALONE, "--scores"),
        (_holds("b.json", json.dumps(BENCH | {"machine": 1})), ["--bench", "b.json"], "--bench"),
        (lambda run: [_holds("s.json", json.dumps(SCORES))(run), _holds("b.json", "{}")(run)], SCORES_FIRST, "--bench"),
        (_holds("s.json", "[]"), ["--bench", "s.json"], "s.json"),
        (lambda run: None, ["--bench", "absent.json"], "absent.json"),
    ],
)
def test_what_cannot_be_published_is_one_sentence(run, monkeypatch, spoil, options, word):
    monkeypatch.chdir(run)
    spoil(run)
    before = (run / "README.md").read_text() if (run / "README.md").exists() else None
    code, printed = _publish(run, *options)
    printed = " ".join(printed.split())
    assert code == 2 and word in printed and "Traceback" not in printed
    for option in {"--scores", "--bench"} - {word}:
        assert option not in printed
    assert not list(run.glob("*.partial"))
    assert before is None or (run / "README.md").read_text() == before


def test_a_missing_extra_is_one_sentence(run, monkeypatch):
    for module in ("turbosparse.publish.card", "turbosparse.publish.run"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "pydantic", None)
    with pytest.raises(UserError, match=r"turbosparse\[train\]"):
        publish.command(run)  # not by way of typer, which may need the same package


def test_publishing_never_loads_torch(run):
    script = "import sys; sys.modules['torch'] = None; from turbosparse.cli import main; main()"
    subprocess.run([sys.executable, "-c", script, "publish", run], check=True)
