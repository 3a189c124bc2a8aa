"""Chat at a terminal, where a conversation that is too long is a sentence and not the end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import turbosparse

pty = pytest.importorskip("pty", reason="pseudo-terminals of POSIX")


def test_a_conversation_that_is_too_long_can_be_forgotten(tiny_gguf):
    environment = {**os.environ, "PYTHONPATH": str(Path(turbosparse.__file__).parents[1]), "TERM": "dumb"}
    model = tiny_gguf("llama", "drelu", "q8_0")
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-m", "turbosparse", "chat", str(model), "--ctx", "60", "-n", "4"],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )
    os.close(theirs)
    os.write(ours, b"a message that has many more tokens than any context as short as this one\n/reset\nhi\n/exit\n")
    answers, notices = child.communicate(timeout=60)
    os.close(ours)
    assert child.returncode == 0, notices
    assert b"does not fit the context of 60" in notices and b"/reset" in notices and b"Traceback" not in notices
    assert len(answers.replace(b"> ", b"").strip()) > 0
