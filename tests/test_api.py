"""The few functions of `import turbosparse`."""

import subprocess
import sys
from pathlib import Path

import pytest

import turbosparse
from turbosparse.engine import SamplingParams
from turbosparse.errors import UserError


@pytest.fixture(scope="module")
def engine(tiny_gguf):
    return turbosparse.load(tiny_gguf("llama", "drelu", "f32"), threads=1, compute="f32")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 3)
    return path


def test_text_in_text_out_the_same_in_both_modes(engine):
    exact = "".join(turbosparse.generate(engine, "The quick", max_tokens=10))
    dense = "".join(turbosparse.generate(engine, "The quick", max_tokens=10, mode="dense"))
    lossless = "".join(turbosparse.generate(engine, "The quick", max_tokens=10, mode="lossless"))
    assert exact == dense == lossless != ""
    warm = SamplingParams(temperature=2.0, seed=3)
    assert "".join(turbosparse.generate(engine, "The quick", 10, warm)) != exact


def test_mistakes_come_at_the_call_not_at_the_first_piece(engine):
    with pytest.raises(UserError, match="do not fit the context"):
        turbosparse.generate(engine, "word " * 300)


def test_analyze_takes_an_engine_a_file_and_a_folder(engine, tiny_gguf, tiny_folder, text):
    seen = []
    by_engine = turbosparse.analyze(engine, text, progress=lambda done, total: seen.append((done, total)))
    by_folder = turbosparse.analyze(tiny_folder("llama", "drelu"), str(text))
    assert seen == [(by_engine.tokens, by_engine.tokens)] and by_engine.tokens == by_folder.tokens
    for name in ("gate", "up", "h"):
        assert by_engine.mean(name) == pytest.approx(by_folder.mean(name), abs=1e-4)
    assert 0.5 < by_engine.mean("h") < 1
    by_file = turbosparse.analyze(tiny_gguf("llama", "drelu", "f32"), text, limit=9)
    assert by_file.tokens == 9


def test_a_dense_folder_shows_signs_of_gate_and_up_and_no_zeros(tiny_folder, text):
    report = turbosparse.analyze(tiny_folder("qwen2"), text)
    assert report.mean("h") == 0.0 and 0.2 < report.mean("gate") < 0.8 and 0.2 < report.mean("up") < 0.8


def test_a_window_that_the_model_cannot_hold(engine, tmp_path):
    (tmp_path / "long.txt").write_text("The quick brown fox. " * 200)
    with pytest.raises(UserError, match="--limit 256"):
        turbosparse.analyze(engine, tmp_path / "long.txt")


def test_convert_writes_a_folder(tiny_folder, tmp_path):
    record = turbosparse.convert(tiny_folder("llama"), tmp_path / "sparse", "reglu")
    assert record["activation"] == "reglu" and (tmp_path / "sparse" / "config.json").is_file()


def test_names_load_what_they_need_and_no_more():
    script = (
        "import sys, turbosparse; heavy = lambda: {'numpy', 'torch', 'transformers'} & set(sys.modules); "
        "assert not heavy(), heavy(); turbosparse.load, turbosparse.analyze; assert 'torch' not in sys.modules; "
        "import turbosparse.analyze.capture; assert callable(turbosparse.analyze); "
        "from turbosparse import analyze, load; assert callable(analyze) and not hasattr(turbosparse, 'nothing')"
    )
    environment = {"PYTHONPATH": str(Path(turbosparse.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
