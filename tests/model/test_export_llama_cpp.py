"""Exported files in llama.cpp; of a real model, which is $TURBOSPARSE_TEST_MODELS/SmolLM2-135M-Instruct.Q4_1.gguf."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from agreement import logits_error
from factories import MIXTURES

from turbosparse.model.export import export_gguf

_PEER = """
import sys
import llama_cpp
# One token a batch: some builds crash in their batched kernels, on anybody's file.
model = llama_cpp.Llama(sys.argv[1], n_ctx=256, n_batch=1, n_threads=2, verbose=False)
print(model(sys.argv[2], max_tokens=24, temperature=0)["choices"][0]["text"])
"""


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The Hugging Face folder of the real model with an activation, made once."""
    from turbosparse import convert

    source = Path(os.environ.get("TURBOSPARSE_TEST_MODELS", ".")) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not source.exists():
        pytest.skip(f"{source.name} is not in TURBOSPARSE_TEST_MODELS")
    folders = tmp_path_factory.mktemp("real")

    def folder(activation):
        out = folders / activation
        if not out.exists():
            convert(source, out, activation)
        return out

    return folder


def _run_llama_cpp(path):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra bench)")
    arguments = [sys.executable, "-c", _PEER, str(path), "The capital of France is"]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=300)


@pytest.mark.models
@pytest.mark.parametrize("quant", ["q4_0", "q8_0", "f16"])
def test_llama_cpp_runs_the_dense_twin(real, tmp_path, quant):
    export_gguf(real("keep"), tmp_path / "a.gguf", quant)
    run = _run_llama_cpp(tmp_path / "a.gguf")
    assert run.returncode == 0, run.stderr[-2000:]
    assert "Paris" in run.stdout


@pytest.mark.models
def test_llama_cpp_refuses_the_sparse_file(real, tmp_path):
    export_gguf(real("drelu"), tmp_path / "a.gguf", "q4_0")
    run = _run_llama_cpp(tmp_path / "a.gguf")
    assert run.returncode == 1 and "Failed to load model" in run.stderr
    assert not run.stdout.strip()


_LOGITS = """
import sys, numpy as np
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=64, logits_all=True, verbose=False, n_threads=2)
for token in map(int, sys.argv[3:]):
    model.eval([token])
np.save(sys.argv[2], model.scores[: len(sys.argv) - 3])
model.close()
"""


@pytest.mark.models
@pytest.mark.parametrize("family", MIXTURES)
def test_llama_cpp_finds_the_same_logits_in_a_mixture(tiny_gguf, tmp_path, family):
    from turbosparse.engine import Engine

    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra bench)")
    tokens = np.random.default_rng(3).integers(3, 300, size=40).tolist()
    arguments = [sys.executable, "-c", _LOGITS, tiny_gguf(family), tmp_path / "logits.npy", *tokens]
    subprocess.run(list(map(str, arguments)), capture_output=True, timeout=300, check=True)
    theirs = np.load(tmp_path / "logits.npy")
    ours = Engine.load(tiny_gguf(family), compute="f32").session().logits(tokens)
    error = logits_error(ours, theirs)
    assert error.max() < 5e-3  # its keys and values are float16
