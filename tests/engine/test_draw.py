"""Drawing from a sketch of the head: the tokens that all logits give, whatever the head, and fewer bytes."""

from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from agreement import equal_bits
from factories import add_predictor, make_folder, random_predictor
from gguf import GGMLQuantizationType as Type
from gguf_files import edit_gguf

from turbosparse import _native
from turbosparse.engine import Engine, SamplingParams, Session
from turbosparse.model.config import ModelConfig
from turbosparse.model.export import export_gguf
from turbosparse.model.gguf import GGUFFile

PROMPT = [int(token) for token in np.random.default_rng(5).integers(3, 300, size=12)]
SEEN = 8  # inputs of the head before there is a sketch
SETTINGS = [
    SamplingParams(),
    *(SamplingParams(temperature, seed=seed) for temperature, seed in product((0.3, 0.8, 2.0), (1, 2))),
    SamplingParams(0.8, min_p=0.05, seed=3),
    SamplingParams(2.0, min_p=1.0, seed=3),
    SamplingParams(repetition_penalty=1.3),
    SamplingParams(0.8, repetition_penalty=0.7, seed=4),
    SamplingParams(0.8, top_k=5, seed=5),
    SamplingParams(0.8, top_p=0.7, seed=6),
]


def begun(engine: Engine, mode: str, prompt: list[int] = PROMPT) -> Session:
    session = engine.session()
    session.prefill(prompt, mode)
    return session


def from_all_logits(engine: Engine, params: SamplingParams, mode: str, count: int) -> list[int]:
    session = begun(engine, mode)
    tokens = [session.sample(params)]
    for _ in range(count):
        session.decode(tokens[-1], mode)
        tokens.append(session.sample(params))
    return tokens


def drawn(engine: Engine, params: SamplingParams, mode: str, count: int) -> list[int]:
    session = begun(engine, mode)
    tokens = [session.sample(params)]
    for _ in range(count):
        tokens.append(session.draw(tokens[-1], params, mode))
    return tokens


def bytes_of(engine: Engine, draw: Callable[..., list[int]], params: SamplingParams, mode: str, count: int) -> int:
    engine.traffic(reset=True)
    draw(engine, params, mode, count)
    return engine.traffic(reset=True).bytes


def check(engine: Engine, mode: str, settings: list[SamplingParams] = SETTINGS, count: int = 30) -> None:
    for params in settings:
        assert drawn(engine, params, mode, count) == from_all_logits(engine, params, mode, count), params


def sketched(engine: Engine) -> bool:
    """Whether the engine makes a sketch: weights take more once it has seen a few inputs of the head."""
    before = engine.weight_bytes
    drawn(engine, SamplingParams(), "dense", SEEN)
    return engine.weight_bytes > before


def with_head(source: Path, out: Path, head: np.ndarray, norm: np.ndarray | None = None) -> Path:
    """The model with this head (untied) and this output norm, in F32."""
    tensors = {"output.weight": head.astype(np.float32)}
    return edit_gguf(source, out, tensors=tensors | ({} if norm is None else {"output_norm.weight": norm}))


def shape_of(path: Path) -> tuple[int, int]:
    with GGUFFile.open(path) as file:
        config = ModelConfig.from_gguf(file)
    return config.vocab_size, config.hidden_size


@pytest.mark.parametrize("quant", ["f32", "f16", "q8_0", "q4_0"])
@pytest.mark.parametrize(("family", "activation"), [("llama", "drelu"), ("gemma2", "dense"), ("qwen3", "reglu")])
def test_the_tokens_are_those_of_all_logits(tiny_gguf, family, activation, quant):
    engine = Engine.load(tiny_gguf(family, activation, quant), threads=2)
    assert sketched(engine)
    check(engine, "dense" if activation == "dense" else "exact", count=16)


@pytest.mark.parametrize("isa", _native.isas())
def test_every_instruction_set_and_number_of_threads(tiny_gguf, isa):
    for family, quant in (("llama", "q8_0"), ("qwen3", "f16")):  # one and two terms, and none
        for threads in (1, 3):
            check(Engine.load(tiny_gguf(family, "drelu", quant), threads=threads, isa=isa), "exact", SETTINGS[:6:2], 20)


def test_where_no_sketch_pays(tiny_gguf, tmp_path):
    in_fp32 = Engine.load(tiny_gguf("llama", "drelu", "q8_0"), compute="f32", threads=2)
    narrow = make_folder(tmp_path / "hf", "llama", hidden_size=48, num_attention_heads=3, num_key_value_heads=1)
    export_gguf(narrow, tmp_path / "narrow.gguf", "f16")
    for engine in (in_fp32, Engine.load(tmp_path / "narrow.gguf", threads=2)):
        assert not sketched(engine)
        check(engine, "dense", SETTINGS[:4], 12)


def heads(vocab: int, hidden: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(6)
    plain = rng.standard_normal((vocab, hidden)) / hidden**0.5
    pairs = plain[np.arange(vocab) // 2]
    broken = plain.copy()
    broken[7, 3], broken[11, 5] = np.nan, np.inf
    return {
        "pairs of equals": pairs,
        "tiny gaps": plain[np.arange(vocab) % 4] + 1e-5 * plain,
        "all alike": np.tile(plain[:1], (vocab, 1)),
        "zeros": np.where(np.arange(vocab)[:, None] % 3 == 0, plain, 0),
        "nothing": 0 * plain,
        "large": 500 * plain,
        "small": 1e-30 * plain,
        "of many sizes": plain * 10.0 ** rng.integers(-8, 3, (vocab, 1)),
        "outliers": np.where(rng.random((vocab, hidden)) < 0.02, 30 * plain, plain),
        "too large": 1e6 * plain,
        "broken": broken,
    }


@pytest.mark.parametrize("name", heads(16, 32))
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_heads_that_are_hard_to_sketch(tiny_gguf, tmp_path, family, name):
    source = tiny_gguf(family, "drelu", "q8_0")
    head = heads(*shape_of(source))[name]
    engine = Engine.load(with_head(source, tmp_path / "m.gguf", head), threads=2)
    assert sketched(engine) == (name not in ("broken", "too large"))
    check(engine, "exact", [SETTINGS[i] for i in (0, 3, 5, 7, 9)], 12)
    if name == "pairs of equals":
        tokens = drawn(engine, SamplingParams(), "exact", 24)
        assert not any(token % 2 for token in tokens) and any(tokens)
    if name == "nothing":
        assert not any(drawn(engine, SamplingParams(), "exact", 24))


def test_a_vocabulary_of_any_size_and_states_that_are_zero_or_no_number(tiny_gguf, tmp_path):
    folder = make_folder(tmp_path / "hf", "llama", "drelu", vocab_size=451)
    source = tmp_path / "m.gguf"
    export_gguf(folder, source, "q8_0")
    check(Engine.load(source, threads=2), "exact", SETTINGS[:4], 20)
    rows, columns = shape_of(source)
    head = np.random.default_rng(7).standard_normal((rows, columns))
    for index, value in enumerate((0.0, np.nan, 3e38)):
        norm = np.full(columns, value, np.float32)
        engine = Engine.load(with_head(source, tmp_path / f"{index}.gguf", head, norm), threads=2)
        check(engine, "exact", SETTINGS[:4], 12)


def test_states_that_become_no_number_once_there_is_a_sketch(tiny_gguf, tmp_path):
    """A token whose embedding is infinite: its logits are none, so the whole head is asked."""
    source = tiny_gguf("qwen3", "drelu", "f32")
    with GGUFFile.open(source) as file:
        tensor = file.tensors["token_embd.weight"]
        embedding = tensor.data.view(np.float32).reshape(tensor.shape).copy()
    embedding[9] = np.inf
    engine = Engine.load(edit_gguf(source, tmp_path / "m.gguf", tensors={"token_embd.weight": embedding}), threads=2)
    drawn(engine, SamplingParams(), "exact", SEEN)
    one, other = begun(engine, "exact"), begun(engine, "exact")
    for token in (4, 9, 5):
        one.decode(token, "exact")
        assert other.draw(token, SETTINGS[1], "exact") == one.sample(SETTINGS[1])


@pytest.mark.parametrize("params", [SETTINGS[0], SETTINGS[3]])
def test_a_draw_reads_less_and_a_flat_head_little_more(tiny_gguf, tmp_path, params):
    source = tiny_gguf("llama", "drelu", "q8_0")
    rows, columns = shape_of(source)
    rng, count = np.random.default_rng(8), 60
    peaked = rng.standard_normal((rows, columns))
    flat = np.tile(peaked[:1], (rows, 1)) + 1e-3 * peaked
    saved = []
    for name, head in (("peaked", peaked), ("flat", flat)):
        engine = Engine.load(with_head(source, tmp_path / f"{name}.gguf", head), threads=2)
        drawn(engine, params, "exact", SEEN)
        one, other = (bytes_of(engine, draw, params, "exact", count) for draw in (from_all_logits, drawn))
        saved.append((one - other) / (count * 4 * columns * rows))  # shares of the head
    assert 0.5 < saved[0] < 0.86
    assert -0.1 < saved[1] < 0.2  # the sketch is read a few times, in vain where the largest logit is drawn
    assert params.temperature > 0 or saved[1] < 0


def test_phases_hold_the_bytes_that_a_draw_reads(tiny_gguf):
    engine = Engine.load(tiny_gguf("qwen3", "drelu", "f16"), threads=2)
    drawn(engine, SamplingParams(), "exact", SEEN)
    for mode in ("dense", "exact"):
        engine.time_phases()
        engine.phases(reset=True)
        read = bytes_of(engine, drawn, SamplingParams(), mode, 10)
        engine.time_phases(False)
        phases = engine.phases()
        rows, columns = engine.config.vocab_size, engine.config.hidden_size
        sketch = columns // 32 * 18 + 4  # a row, with its bound
        assert 10 * rows * sketch < phases["head"].bytes < 10 * rows * 2 * columns
        weights = sum(phase.bytes for name, phase in phases.items() if name != "attention")
        assert weights == read - 10 * 2 * columns  # rows of the embedding


@pytest.mark.parametrize("share", [0.4, 1.0])
def test_the_audit_sees_all_logits(tiny_gguf, tmp_path, share):
    source = tiny_gguf("llama", "drelu", "q8_0")
    predictor = random_predictor(2, 64, 96, 32, False, without=0)
    engine = Engine.load(add_predictor(source, tmp_path / "m.gguf", predictor, Type.Q8_0), threads=2)
    drawn(engine, SamplingParams(), "predicted", SEEN)
    reports, params = [], SamplingParams(0.8, seed=9)
    for ours in (False, True):
        session = begun(engine, "predicted")
        session.audit(share, seed=1)
        token, tokens = session.sample(params), []
        for _ in range(30):
            if ours:
                token = session.draw(token, params, "predicted")
            else:
                session.decode(token, "predicted")
                token = session.sample(params)
            tokens.append(token)
        reports.append((tokens, session.audit_report))
    assert reports[0] == reports[1]
    assert len(reports[1][1].verdicts) > 5 and reports[1][1].kl.mean > 0


def test_automatic_modes_choose_as_ever(tiny_gguf):
    engine = Engine.load(tiny_gguf("llama", "drelu", "q8_0"), threads=2)
    check(engine, "auto", SETTINGS[:2], 40)


def test_a_draw_leaves_the_cache_of_decode_and_no_logits(tiny_gguf):
    engine = Engine.load(tiny_gguf("llama", "drelu", "q8_0"), threads=2)
    drawn(engine, SamplingParams(), "exact", SEEN)
    one, other = begun(engine, "exact"), begun(engine, "exact")
    for token in (5, 6, 7):
        one.decode(token, "exact")
        other.draw(token, SamplingParams(), "exact")
    with pytest.raises(ValueError, match="no logits"):
        other.sample(SamplingParams())
    assert one.position == other.position
    assert equal_bits(one.decode(8, "exact"), other.decode(8, "exact"))
    assert other.sample(SamplingParams()) == one.sample(SamplingParams())
    with pytest.raises(ValueError, match="vocabulary"):
        other.draw(engine.config.vocab_size, SamplingParams(), "exact")
