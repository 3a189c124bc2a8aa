"""Several sequences decoded together: each gets the bits that it gets alone, and weights are read once for all."""

import numpy as np
import pytest
from agreement import equal_bits

from turbosparse import _native
from turbosparse.engine import Engine
from turbosparse.errors import UserError

TOKENS = np.random.default_rng(5).integers(3, 300, size=(70, 100)).tolist()
SIZES = (1, 2, 3, 5, 16, 70)  # the last is more than one pass takes


def begun(engine: Engine, index: int, mode: str):
    """A session that has read a prompt of its own, of a length of its own."""
    session = engine.session(100)
    session.prefill(TOKENS[index][: 1 + 7 * index % 40], mode)
    return session


@pytest.mark.parametrize("quant", ["q4_0", "q8_0", "f32"])
@pytest.mark.parametrize("isa", _native.isas())
def test_together_as_alone(tiny_gguf, isa, quant):
    engine = Engine.load(tiny_gguf("llama", "drelu", quant), threads=2, isa=isa)
    check_batches(engine, SIZES)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "qwen2", "qwen3"])
@pytest.mark.parametrize("activation", ["reglu", "dense"])
def test_together_as_alone_in_every_family(tiny_gguf, family, activation):
    check_batches(Engine.load(tiny_gguf(family, activation, "q8_0"), threads=3), (2, 5))


def check_batches(engine: Engine, sizes: tuple[int, ...]) -> None:
    for mode in engine.modes:
        alone = []
        for index in range(max(sizes)):
            session = begun(engine, index, mode)
            alone.append(np.stack([session.decode(token, mode) for token in TOKENS[index][50:53]]))
        for size in sizes:
            sessions = [begun(engine, index, mode) for index in range(size)]
            for step in range(3):
                logits = engine.decode_batch(sessions, [TOKENS[index][50 + step] for index in range(size)], mode)
                assert logits.shape == (size, engine.config.vocab_size)
                for index in range(size):
                    assert equal_bits(logits[index], alone[index][step]), (mode, size, index, step)
            assert [session.position for session in sessions] == [1 + 7 * i % 40 + 3 for i in range(size)]


def test_rows_that_several_sequences_need_are_read_once(tiny_gguf):
    engine = Engine.load(tiny_gguf("llama", "drelu", "q8_0"), threads=2)
    read = {}
    for mode in engine.modes:
        for same in (True, False):
            sessions = [begun(engine, 0 if same else index, mode) for index in range(4)]
            engine.traffic(reset=True)
            engine.decode_batch(sessions, [TOKENS[0 if same else index][60] for index in range(4)], mode)
            traffic = engine.traffic()
            assert traffic.tokens == 4
            read[mode, same] = traffic.bytes
        alone = begun(engine, 0, mode)
        engine.traffic(reset=True)
        alone.decode(TOKENS[0][60], mode)
        row = engine.config.hidden_size // 32 * 34
        assert read[mode, True] == engine.traffic().bytes + 3 * row  # every sequence looks up its embedding
    assert read["dense", False] == read["dense", True]
    assert read["exact", True] < read["exact", False] < read["dense", False]


def test_sessions_sample_from_their_own_logits(tiny_gguf):
    from turbosparse.engine import SamplingParams

    engine = Engine.load(tiny_gguf("llama", "drelu", "q8_0"), threads=2)
    sessions = [begun(engine, index, "exact") for index in range(3)]
    logits = engine.decode_batch(sessions, [5, 6, 7], "exact")
    assert [session.sample(SamplingParams()) for session in sessions] == logits.argmax(axis=1).tolist()


def test_what_cannot_be_decoded_together(tiny_gguf):
    engine, other = (Engine.load(tiny_gguf("llama", "drelu", "q8_0"), threads=1) for _ in range(2))
    a, b = engine.session(8), engine.session(8)
    with pytest.raises(ValueError, match="given twice"):
        engine.decode_batch([a, b, a], [3, 4, 5])
    with pytest.raises(ValueError, match="another model"):
        engine.decode_batch([a, other.session(8)], [3, 4])
    with pytest.raises(ValueError):
        engine.decode_batch([a, b], [3])
    with pytest.raises(ValueError, match="no tokens"):
        engine.decode_batch([], [])
    b.prefill(list(range(3, 11)))
    with pytest.raises(UserError, match="do not fit the context of 8"):
        engine.decode_batch([a, b], [3, 4])
    assert a.position == 0
