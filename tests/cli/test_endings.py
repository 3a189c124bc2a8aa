"""How a command ends that does not end by itself: Ctrl-C, a reader that goes away, a terminal of another encoding."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import turbosparse

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(turbosparse.__file__).parents[1]), "COLUMNS": "100"}
PATIENCE = 60


@pytest.fixture(scope="module")
def sparse(tiny_gguf) -> Path:
    return tiny_gguf("llama", "drelu", "q8_0")


def _start(*arguments: object, **changes: str) -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", "turbosparse", *map(str, arguments)]
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=ENVIRONMENT | changes)


def _interrupt_after_first_output(child: subprocess.Popen[bytes]) -> None:
    guard = threading.Timer(PATIENCE, child.kill)  # a child that says nothing fails the test instead of hanging it
    guard.start()
    assert child.stdout.read(1)
    child.send_signal(signal.SIGINT)
    guard.cancel()


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_is_130_without_a_word(tiny_folder, tmp_path):
    child = _start("run", _endless(tiny_folder, tmp_path), "-p", "hi", "-n", 100_000, "--ctx", 150_000, "--ignore-eos")
    _interrupt_after_first_output(child)
    _, error = child.communicate(timeout=PATIENCE)
    assert child.returncode == 130 and b"Traceback" not in error


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(tiny_folder, tmp_path):
    model = _endless(tiny_folder, tmp_path)
    child = _start("chat", model, "-n", 100_000, "--ctx", 150_000, "--temperature", 1, "--stop", "never that")
    child.stdin.write(b"hello\n")
    child.stdin.flush()
    _interrupt_after_first_output(child)
    _, error = child.communicate(b"/exit\n", timeout=PATIENCE)
    assert child.returncode == 0 and error == b""


def _endless(tiny_folder, folder: Path) -> Path:
    """A model whose context lasts for longer than a test waits, and which has no token to end with."""
    from factories import make_folder

    from turbosparse.model.export import export_gguf

    made = make_folder(folder / "hf", "llama", "drelu", max_position_embeddings=200_000)
    export_gguf(made, folder / "endless.gguf", "q8_0")
    return folder / "endless.gguf"


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of POSIX")
def test_a_reader_that_goes_away_is_no_error_message(sparse):
    child = _start("run", sparse, "-p", "the quick", "-n", 200, "--ignore-eos")
    child.stdout.close()
    error = child.stderr.read()
    child.wait(timeout=PATIENCE)
    assert error == b""
    child.stdin.close()
    child.stderr.close()


def test_a_terminal_without_the_characters_shows_the_rest(sparse):
    command = ("run", sparse, "-p", "the quick", "-n", 24, "--ignore-eos", "--temperature", 2)
    plain, _ = _start(*command, PYTHONIOENCODING="utf-8").communicate(timeout=PATIENCE)
    assert not plain.isascii(), "the model writes ASCII only: this test needs another seed"
    child = _start(*command, PYTHONIOENCODING="ascii")
    poor, error = child.communicate(timeout=PATIENCE)
    assert child.returncode == 0 and b"Traceback" not in error
    assert poor.isascii() and len(poor) == len(plain.decode())
    whole, _ = _start(*command, "--json", PYTHONIOENCODING="ascii").communicate(timeout=PATIENCE)
    assert json.loads(whole)["text"] + "\n" == plain.decode()


def test_chat_refuses_what_is_not_text(sparse):
    child = _start("chat", sparse, "-n", 4, PYTHONIOENCODING="utf-8")
    _, error = child.communicate(b"\xff\xfe\n", timeout=PATIENCE)
    assert child.returncode == 2 and b"Traceback" not in error and error.count(b"\n") == 1
