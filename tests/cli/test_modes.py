"""Mode lossless and the audit of predicted mode, from the command line."""

import gguf
import pytest
from factories import add_predictor, random_predictor
from test_stages import turbo, turbo_json

from turbosparse.cli import modes
from turbosparse.model.config import ModelConfig
from turbosparse.model.gguf import GGUFFile


@pytest.fixture(scope="module")
def predicting(tiny_gguf, tmp_path_factory):
    """A tiny model whose predictors select about a half and promise to keep 99 % of |h|."""
    source = tiny_gguf("llama", "drelu", "q8_0")
    with GGUFFile.open(source) as file:
        c = ModelConfig.from_gguf(file)
    predictor = random_predictor(c.n_layers, c.hidden_size, c.ffn_size, 32, True)
    predictor = type(predictor)(predictor.layers, True, 0.99)
    out = tmp_path_factory.mktemp("p") / "m.gguf"
    return add_predictor(source, out, predictor, gguf.GGMLQuantizationType.Q8_0)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    return path


def test_lossless_writes_what_exact_writes_and_says_how(predicting):
    options = ["-p", "the quick", "-n", 60, "--ignore-eos", "--temperature", 0.7, "--seed", 4]
    exact = turbo_json("run", predicting, "--mode", "exact", *options)
    ours = turbo_json("run", predicting, "--mode", "lossless", *options)
    assert ours["text"] == exact["text"] and ours["tokens"] == exact["tokens"] == 60
    assert ours["mode"] == "lossless" and exact["lossless"] is None is ours["audit"]
    drafts = ours["lossless"]
    assert drafts["tokens"] == 59 and drafts["tokens_per_verification"] == 59 / drafts["verifications"]
    assert drafts["acceptance"] is None or 0 <= drafts["acceptance"] <= 1
    said = turbo("run", predicting, "--mode", "lossless", *options)
    assert said.stdout == exact["text"] + "\n" and "tokens a verification" in said.stderr


def test_an_audit_is_reported_and_its_moves_are_never_silent(predicting):
    options = ["-p", "the quick", "-n", 60, "--ignore-eos", "--mode", "predicted", "--temperature", 1.5]
    plain = turbo_json("run", predicting, *options, "--audit", 0)
    record = turbo_json("run", predicting, *options, "--audit", 1)["audit"]
    assert plain["audit"]["tokens"] == 0 and plain["audit"]["recall"]["mean"] is None
    assert record["tokens"] == 59 and record["promised"] == pytest.approx([0.99, 0.99])
    for name in ("recall", "kept", "kl"):
        assert record[name]["low"] < record[name]["mean"] < record[name]["high"]
    assert [layer["layer"] for layer in record["layers"]] == [0, 1] and 0 < record["layers"][0]["recall"] < 1
    assert record["moves"][0]["by"] < 0
    said = turbo("run", predicting, *options, "--audit", 1).stderr
    assert "audit of 59 tokens" in said and said.count("its threshold is ") == len(record["moves"])
    assert "none of these tokens" in turbo("run", predicting, *options, "--audit", 0).stderr


def test_a_chat_says_it_at_its_end(predicting):
    said = turbo("chat", predicting, "-n", 9, "--mode", "predicted", "--audit", 1, stdin="hello\nand more\n")
    assert "audit of " in said.stderr
    said = turbo("chat", predicting, "-n", 9, "--mode", "lossless", stdin="hello\nand more\n")
    exact = turbo("chat", predicting, "-n", 9, "--mode", "exact", stdin="hello\nand more\n")
    assert said.stdout == exact.stdout and "tokens a verification" in said.stderr and exact.stderr == ""


def test_bench_times_lossless_on_a_text_and_audits(predicting, text):
    options = ["-n", 6, "--prompt-tokens", 8, "--repeats", 2, "--audit", 0.5]
    record = turbo_json("bench", predicting, *options, "--data", text)
    assert [run["mode"] for run in record["runs"]] == ["dense", "exact", "predicted", "lossless"]
    predicted, lossless = record["runs"][2:]
    assert lossless["lossless"]["tokens"] == 12 and lossless["audit"] is None is predicted["lossless"]
    assert predicted["audit"]["share"] == 0.5 and 0 < predicted["audit"]["tokens"] < 12
    assert record["speedup"]["lossless"] > 0 and lossless["decode_tok_s"] > 0
    shown = turbo("bench", predicting, *options, "--data", text).stdout
    assert "tokens a verification" in shown and "audit of" in shown
    assert "lossless" not in {run["mode"] for run in turbo_json("bench", predicting, *options)["runs"]}
    assert "longer text" in turbo("bench", predicting, "--prompt-tokens", 250, "-n", 1, "--data", text, code=2).stderr


def test_mistakes_are_one_sentence(predicting):
    assert "--audit 2" in turbo("run", predicting, "-p", "x", "--mode", "predicted", "--audit", 2, code=2).stderr


def test_few_tokens_have_no_interval():
    none = {"mean": None, "low": None, "high": None}
    one = {"mean": 0.5, "low": None, "high": None}
    audit = {"tokens": 1, "share": 0.5, "recall": one, "kept": one, "kl": one}
    assert "±" not in modes.audit_line(audit) and "50.0 %" in modes.audit_line(audit)
    assert "none of these" in modes.audit_line({"tokens": 0, "share": 0.005, "recall": none, "kept": none, "kl": none})
