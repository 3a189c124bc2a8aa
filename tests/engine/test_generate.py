"""Streaming text: where it ends, what is held back, and that a seed fixes it."""

import pytest

from turbosparse.engine import Engine, SamplingParams, generate
from turbosparse.engine.generate import _StopStrings
from turbosparse.errors import UserError


@pytest.fixture(scope="module")
def engine(tiny_gguf) -> Engine:
    return Engine.load(tiny_gguf("llama", "drelu", "q8_0"), threads=2)


def text_of(engine: Engine, **options: object) -> tuple[str, str | None]:
    chunks = list(generate(engine, [5, 6, 7], max_tokens=24, ignore_eos=True, **options))
    return "".join(chunk.text for chunk in chunks), chunks[-1].finish


def test_a_seed_fixes_the_text_in_any_mode(engine):
    hot = SamplingParams(temperature=1.5, top_k=40, top_p=0.95, seed=3)
    first, finish = text_of(engine, params=hot)
    assert finish == "length" and first
    assert text_of(engine, params=hot, mode="exact") == (first, "length")
    assert text_of(engine, params=SamplingParams(temperature=1.5, top_k=40, top_p=0.95, seed=4))[0] != first


def test_chunks_join_to_what_the_tokens_say(engine):
    chunks = list(generate(engine, [5, 6, 7], max_tokens=24, ignore_eos=True))
    assert len(chunks) == 24 and all(chunk.finish is None for chunk in chunks[:-1])
    assert "".join(chunk.text for chunk in chunks) == engine.tokenizer.decode([chunk.token for chunk in chunks])


def test_a_stop_string_ends_the_text_before_itself(engine):
    whole, _ = text_of(engine)
    stop = whole[5:9]
    text, finish = text_of(engine, stop=[stop, "never there"])
    assert finish == "stop" and text == whole[: whole.index(stop)]


def test_eos_ends_the_text(engine, monkeypatch):
    chunks = list(generate(engine, [5, 6, 7], max_tokens=8, ignore_eos=True))
    monkeypatch.setattr(engine.tokenizer, "eos_ids", frozenset({chunks[3].token}))
    first = [chunk.token for chunk in chunks].index(chunks[3].token)
    ended = list(generate(engine, [5, 6, 7], max_tokens=8))
    assert ended[-1].finish == "eos" and len(ended) == first + 1
    said = engine.tokenizer.decode([chunk.token for chunk in chunks[:first]])
    assert "".join(chunk.text for chunk in ended) == said


@pytest.mark.parametrize("pieces", [["ab", "cSTO", "P", "def"], ["a", "b", "c", "S", "T", "O", "Pd"], ["abcSTOPdef"]])
def test_text_that_may_become_a_stop_string_is_held_back(pieces):
    stops = _StopStrings(["STOP", "STAR"])
    shown = ""
    for piece in pieces:
        text, found = stops.push(piece)
        shown += text
        assert "S" not in shown
        if found:
            break
    assert found and shown == "abc"


def test_held_text_is_not_lost_when_the_stop_does_not_come():
    stops = _StopStrings(["STOP"])
    assert stops.push("STO")[0] + stops.push("NE ST")[0] + stops.rest() == "STONE ST"


def test_what_does_not_fit_is_an_error_before_anything_runs(engine):
    with pytest.raises(UserError, match="do not fit the context of 16"):
        generate(engine, [5] * 10, max_tokens=7, session=engine.session(16))
    with pytest.raises(UserError, match="stop string is empty"):
        generate(engine, [5], stop=[""])
