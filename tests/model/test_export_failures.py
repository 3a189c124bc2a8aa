"""What must not be exported, and what must not be left: a file is whole or not there."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
from folders import copy_folder, edit_config, edit_weights

from turbosparse.errors import UserError
from turbosparse.model import export
from turbosparse.model.export import export_gguf


def _set(name, value):
    return lambda folder: edit_weights(folder, lambda weights: weights.__setitem__(name, value(weights)))


UP = "model.layers.1.mlp.up_proj.weight"
BROKEN = {
    "a missing tensor": (lambda f: edit_weights(f, lambda w: w.pop(UP)), UP),
    "no embedding": (lambda f: edit_weights(f, lambda w: w.pop("model.embed_tokens.weight")), "embed_tokens"),
    "a wrong shape": (_set(UP, lambda w: w[UP][:-1].copy()), "shape"),
    "a bias that no such model has": (_set("model.layers.0.mlp.up_proj.bias", lambda w: np.zeros(96, "f4")), "bias"),
    "NaN": (_set(UP, lambda w: np.full_like(w[UP], math.nan)), "NaN"),
    "beyond half precision": (_set(UP, lambda w: np.full_like(w[UP], 1e30)), "F16"),
    "integers": (_set(UP, lambda w: w[UP].astype("i4")), "I32"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "safetensors"),
    "another model": (lambda f: edit_config(f, model_type="bert"), "bert"),
    "more layers than there are": (lambda f: edit_config(f, num_hidden_layers=3), "layers.2"),
    "fewer layers than there are": (lambda f: edit_config(f, num_hidden_layers=1), "layers.1"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_one_sentence_and_leaves_the_old_file(tiny_folder, tmp_path, case):
    damage, named = BROKEN[case]
    folder = copy_folder(tiny_folder("llama"), tmp_path / "hf")
    damage(folder)
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.gguf").write_bytes(b"old")
    with pytest.raises(UserError) as caught:
        export_gguf(folder, out / "a.gguf", "f16")
    assert named in str(caught.value) and "\n" not in str(caught.value)
    assert [file.name for file in out.iterdir()] == ["a.gguf"]
    assert (out / "a.gguf").read_bytes() == b"old"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_export_leaves_nothing(tiny_folder, tmp_path, stop):
    def interrupt(done, total):
        if done > total // 2:
            assert len(list(tmp_path.iterdir())) == 1  # it was under way
            raise stop

    with pytest.raises(stop):
        export_gguf(tiny_folder("llama"), tmp_path / "a.gguf", "q4_0", interrupt)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_sentence(tiny_folder, tmp_path, monkeypatch):
    def full(self, tensor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(UserError, match="No space left"):
        export_gguf(tiny_folder("llama"), tmp_path / "a.gguf", "q4_0")
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written(tiny_folder, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for out, named in (
        (tmp_path, "folder"),
        (tmp_path / "no" / "a.gguf", "does not exist"),
        (tmp_path / "pipe", "pipe"),
    ):
        with pytest.raises(UserError, match=named):
            export_gguf(tiny_folder("llama"), out, "q4_0")
    with pytest.raises(UserError, match="q4_0, q8_0, f16, f32"):
        export_gguf(tiny_folder("llama"), tmp_path / "a.gguf", "q4_k")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "link"])
def test_an_export_never_replaces_what_it_reads(tiny_folder, tmp_path, name):
    folder = copy_folder(tiny_folder("llama"), tmp_path / "hf")
    (tmp_path / "link").symlink_to(folder / "model.safetensors")
    out = tmp_path / name if name == "link" else folder / name
    before = out.read_bytes()
    with pytest.raises(UserError, match=name):
        export_gguf(folder, out, "q4_0")
    assert out.read_bytes() == before
    for _ in range(2):  # into the folder is as good a place as any, and a file of ours may be replaced
        export_gguf(folder, folder / "model.gguf", "q4_0")


def test_a_model_is_exported_without_torch(tiny_folder, tmp_path):
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from turbosparse.model.export import export_gguf\n"
        f"export_gguf({str(tiny_folder('llama', 'drelu'))!r}, {str(tmp_path / 'a.gguf')!r}, 'q4_0')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ, timeout=120)
    assert (tmp_path / "a.gguf").is_file()
