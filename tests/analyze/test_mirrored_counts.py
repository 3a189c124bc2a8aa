"""Firings of neurons of whom two share an up: the engine and the hooks on a folder count the same, neuron by neuron."""

import numpy as np
import pytest

from turbosparse.analyze import capture
from turbosparse.engine import Engine
from turbosparse.evaluate.windows import engine_windows


@pytest.mark.parametrize("group", [2, 4])
def test_both_signs_of_an_up_are_counted(tiny_folder, tiny_gguf, tmp_path, monkeypatch, group):
    monkeypatch.setattr(capture, "summarise", lambda tokens, gate, up, h, *_: (tokens, gate, up, h))
    text = tmp_path / "text.txt"
    text.write_text("The 3 quick brown foxes jump over 12345 dogs, and it's quicker than I'll ever be! " * 4)
    engine = Engine.load(tiny_gguf("llama", "drelu", "f32", group, True), compute="f32")
    tokens, *ours = capture.capture_engine(engine, engine_windows(engine, text))
    theirs_of, *theirs = capture.capture_hf(tiny_folder("llama", "drelu", group, True), text)
    assert tokens == theirs_of > 50
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape == other.shape == (2, 96) and np.abs(mine - other).max() <= 1  # a product that rounds to zero
    up = theirs[1]
    assert np.array_equal(up[:, ::2] + up[:, 1::2], np.full((2, 48), tokens)) and up.std() > 1
