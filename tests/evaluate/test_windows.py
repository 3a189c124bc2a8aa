import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turbosparse.errors import UserError
from turbosparse.evaluate.windows import windows


class Letters:
    """One token a character."""

    eos_id = 0

    def encode(self, text, add_bos=None):
        assert add_bos is False  # BOS inside a text would be read as text
        return [ord(character) for character in text]


def _file(tmp_path, texts):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_documents_are_joined_by_eos_and_windows_stand_side_by_side(tmp_path):
    path = _file(tmp_path, ["ab", "cde", "f"])
    a, b, c, d, e, f = map(ord, "abcdef")
    assert list(windows(Letters(), path, length=3)) == [[a, b, 0], [c, d, e], [0, f]]
    assert list(windows(Letters(), path, length=100)) == [[a, b, 0, c, d, e, 0, f]]


def test_a_tail_of_one_token_is_left_out(tmp_path):
    assert list(windows(Letters(), _file(tmp_path, ["abcd"]), length=3)) == [[97, 98, 99]]


def test_without_eos_nothing_stands_between_documents(tmp_path):
    tokenizer = Letters()
    tokenizer.eos_id = None
    assert list(windows(tokenizer, _file(tmp_path, ["a", "b"]))) == [[97, 98]]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text("xyz", max_size=9), min_size=1, max_size=9), st.integers(2, 7), st.integers(2, 40))
def test_windows_hold_every_token_once_up_to_the_limit(tmp_path_factory, texts, length, limit):
    path = _file(tmp_path_factory.mktemp("w"), texts)
    tokens = [ord(c) if c != "|" else 0 for c in "|".join(texts)][:limit]
    if len(tokens) < 2:
        with pytest.raises(UserError, match="less than two tokens"):
            list(windows(Letters(), path, length, limit))
        return
    found = list(windows(Letters(), path, length, limit))
    joined = [token for window in found for token in window]
    assert joined == (tokens[:-1] if len(tokens) % length == 1 else tokens)
    assert all(len(window) == length for window in found[:-1])


def test_a_window_must_predict_something(tmp_path):
    with pytest.raises(UserError, match="at least 2"):
        list(windows(Letters(), _file(tmp_path, ["abc"]), length=1))
