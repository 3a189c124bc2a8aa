"""Files that lie, seen from the command line: one sentence and exit code 2; tests/model tells one lie from another."""

import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from factories import make_folder
from folders import copy_folder
from gguf import GGMLQuantizationType as Type

import turbosparse
from turbosparse.model.export import export_gguf
from turbosparse.predict.folder import save_folder
from turbosparse.predict.write import StoredPredictor

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(turbosparse.__file__).parents[1]), "COLUMNS": "100"}


def refused(*arguments: object, stdin: str = "") -> str:
    """Run a command that must refuse; returns its sentence."""
    command = [sys.executable, "-m", "turbosparse", *map(str, arguments)]
    done = subprocess.run(
        command, input=stdin, capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=60
    )
    assert done.returncode == 2, done.stderr
    sentence = done.stderr.strip()
    assert sentence.startswith("turbosparse: ") and "\n" not in sentence, sentence
    assert done.stdout == ""
    return sentence


def _tensor(name: bytes = b"w", sizes: tuple[int, ...] = (32, 2), kind: int = 0, offset: int = 0) -> bytes:
    shape = struct.pack("<I", len(sizes)) + b"".join(struct.pack("<Q", size) for size in sizes)
    return struct.pack("<Q", len(name)) + name + shape + struct.pack("<IQ", kind, offset)


def _gguf(*tensors: bytes, count: int | None = None, keys: int = 0) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors) if count is None else count, keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(256)


FILES = {
    "a count that wraps": (_gguf(count=(1 << 64) - 1), "tensors"),
    "more keys than bytes": (_gguf(keys=1 << 40), "keys"),
    "sizes that wrap": (_gguf(_tensor(sizes=(1 << 32, 1 << 32))), "ends at byte"),
    "larger than the file": (_gguf(_tensor(sizes=(32, 3))), "ends at byte"),
    "an offset past the end": (_gguf(_tensor(offset=1 << 40)), "ends at byte"),
    "an unknown type": (_gguf(_tensor(kind=4)), "tensor type 4"),
    "a dimension of zero": (_gguf(_tensor(sizes=(32, 0))), "dimension of zero"),
    "a name twice": (_gguf(_tensor(sizes=(8,)), _tensor(sizes=(8,), offset=32)), "appears twice"),
}


@pytest.mark.parametrize("case", FILES)
@pytest.mark.parametrize("command", [["info"], ["run", "-p", "x"]], ids=["info", "run"])
def test_a_gguf_file_that_lies(case, command, tmp_path):
    content, named = FILES[case]
    (tmp_path / "lie.gguf").write_bytes(content)
    sentence = refused(command[0], tmp_path / "lie.gguf", *command[1:])
    assert named in sentence and "lie.gguf" in sentence


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for %}",
    ],
    ids=["tries to escape", "never ends", "is no template"],
)
def test_a_chat_template_that_is_an_attack(template, tmp_path):
    folder = make_folder(tmp_path / "hf", "llama", "drelu")
    (folder / "chat_template.jinja").write_text(template)
    export_gguf(folder, tmp_path / "attack.gguf", "q8_0")
    assert "chat template" in refused("chat", tmp_path / "attack.gguf", stdin="hello\n")


@pytest.mark.parametrize("command", ["convert", "export"])
def test_an_architecture_that_is_not_supported(command, tiny_folder, tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    for file in tiny_folder("llama").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    changed = config | {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    (folder / "config.json").write_text(json.dumps(changed))
    assert "gpt2" in refused(command, folder, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


class _Trap:
    """Whoever unpickles it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self._folder),)


def test_a_checkpoint_that_is_only_a_pickle(tiny_folder, tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    for file in tiny_folder("llama").iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Trap(tmp_path / "sprung")))
    for command in (["export", folder, tmp_path / "x.gguf"], ["convert", folder, tmp_path / "y"]):
        refused(*command)
    assert not (tmp_path / "sprung").exists()
    pickle.loads(pickle.dumps(_Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists(), "the trap does not work, so this test would pass whatever was loaded"


def _garbage(folder: Path) -> None:
    (folder / "predictors.safetensors").write_bytes(b"no safetensors at all")


def _of_another(folder: Path) -> None:
    save_folder(folder, [StoredPredictor.of(np.ones((32, 64), "f4"), np.ones((96, 32), "f4"), (Type.F32, Type.F32))])


@pytest.mark.parametrize("spoil", [_garbage, _of_another])
@pytest.mark.parametrize("old", [b"a good file", None])
def test_an_export_without_its_predictors_leaves_what_was_there(tiny_folder, tmp_path, spoil, old):
    folder, out = copy_folder(tiny_folder("llama", "drelu"), tmp_path / "hf"), tmp_path / "out.gguf"
    spoil(folder)
    if old is not None:
        out.write_bytes(old)
    assert "predictors.safetensors" in refused("export", folder, out)
    assert {file.name for file in tmp_path.iterdir()} == {"hf"} | ({"out.gguf"} if old else set())
    assert old is None or out.read_bytes() == old


@pytest.mark.parametrize("format", ["gguf", "powerinfer"])
def test_an_export_over_the_model_itself(tiny_folder, tiny_gguf, tmp_path, format):
    folder, file = copy_folder(tiny_folder("llama", "drelu"), tmp_path / "hf"), tmp_path / "m.gguf"
    file.write_bytes(tiny_gguf("llama", "drelu").read_bytes())
    for source, out in ((folder, folder / "model.safetensors"), (file, file)):
        if source is folder or format == "powerinfer":
            before = out.read_bytes()
            assert f"{out} belongs to the model" in refused("export", source, out, "--format", format)
            assert out.read_bytes() == before


def test_a_sentence_cannot_steer_the_terminal(tmp_path):
    said = refused("info", tmp_path / "a\x1b]0;title\x07.gguf")
    assert "\x1b" not in said and "\x07" not in said and "\\x1b" in said


def test_modes_are_not_for_folders(tiny_folder, tmp_path):
    (tmp_path / "text.txt").write_text("Once upon a time.")
    arguments = ("perplexity", tiny_folder("llama", "drelu"), "--data", tmp_path / "text.txt", "--mode", "exact")
    assert "export it first" in refused(*arguments)


def test_folders_without_a_config(tmp_path):
    (tmp_path / "text.txt").write_text("Once upon a time.")
    assert "config.json" in refused("analyze", tmp_path, "--data", tmp_path / "text.txt")


def test_a_bench_that_cannot_be_run_is_refused_before_it_starts(tiny_gguf, tmp_path):
    sparse = tiny_gguf("llama", "drelu", "q8_0")
    sentence = _last_line("bench", sparse, "--prompt-tokens", 250, "-n", 10)
    assert "do not fit a context of 256" in sentence
    folder = make_folder(tmp_path / "hf", "llama", vocab_size=512)
    export_gguf(folder, tmp_path / "twin.gguf", "q8_0")
    assert "vocabulary" in _last_line("bench", sparse, "--dense-twin", tmp_path / "twin.gguf")


def _last_line(*arguments: object) -> str:
    """The sentence of a refusal that may follow a warning about a busy machine."""
    command = [sys.executable, "-m", "turbosparse", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_a_picture_that_cannot_be_saved_is_refused_before_the_demo(tiny_gguf, tmp_path):
    (tmp_path / "text.txt").write_text("Once upon a time.")
    place = tmp_path / "no" / "demo.svg"
    arguments = ("--data", tmp_path / "text.txt", "--svg", place)
    assert str(place.parent) in refused("demo", "--model", tiny_gguf("llama", "drelu", "q4_0"), *arguments)
    assert "exact" in refused("demo", "--model", tiny_gguf("llama", "dense", "q8_0"), *arguments[:2])
