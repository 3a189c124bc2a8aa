"""Mode lossless writes what exact mode writes and leaves the same keys and values, whatever is drafted."""

import itertools

import numpy as np
import pytest
from factories import TinyPredictor, add_predictor, make_folder, random_predictor
from gguf import GGMLQuantizationType as Type
from hypothesis import given
from hypothesis import strategies as st

from turbosparse import _native
from turbosparse.engine import LOSSLESS, Engine, SamplingParams, Session, draw_tokens, generate
from turbosparse.errors import UserError
from turbosparse.model.config import ModelConfig
from turbosparse.model.export import export_gguf
from turbosparse.model.gguf import GGUFFile

PROMPT = [int(token) for token in np.random.default_rng(3).integers(3, 60, size=40)]
GREEDY, HOT = SamplingParams(), SamplingParams(temperature=1.2, top_k=6, repetition_penalty=1.1, seed=5)
FAMILIES = [("llama", None), ("gemma3", "q8_0"), ("gemma2", "f16"), ("mixtral", None), ("qwen3moe", "q8_0")]
FIXED = [(0, 0), (0, 3), (1, 1), (15, 5)]
"""Drafts of each verification: looked up, and where nothing is found predicted."""


def equal_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))


@pytest.fixture(scope="module")
def predicting(tiny_gguf, tmp_path_factory):
    """predicting(family, source=None) -> a tiny dReLU model with predictors that select about a half."""

    def make(family, source=None):
        source = source or tiny_gguf(family, "drelu", "q8_0")
        with GGUFFile.open(source) as file:
            c = ModelConfig.from_gguf(file)
        predictor = random_predictor(c.n_layers, c.hidden_size, c.ffn_size, 32, True, without=0)
        if c.experts:
            rng = np.random.default_rng(7)
            fc1 = rng.standard_normal((c.experts, 32, c.hidden_size)) / c.hidden_size**0.5
            fc2 = rng.standard_normal((c.experts, c.ffn_size, 32)) / 32**0.5
            layer = (fc1, fc2, np.zeros(c.experts))
            predictor = TinyPredictor([None, *[layer] * (c.n_layers - 1)], True)
        return add_predictor(source, tmp_path_factory.mktemp("p") / "m.gguf", predictor, Type.Q8_0)

    return make


def check(
    engine: Engine, cache: str | None, params: SamplingParams, fixed: tuple[int, int], count: int = 120
) -> Session:
    """The tokens of exact mode, and afterwards its logits and its cache; returns the session."""
    exact, ours = engine.session(256, cache), engine.session(256, cache)
    exact_mode = engine.native_mode(LOSSLESS)
    ours._ahead.fix(*fixed)
    assert equal_bits(exact.prefill(PROMPT, exact_mode), ours.prefill(PROMPT, LOSSLESS))
    expected = [exact.sample(params)]
    for _ in range(count - 1):
        exact.decode(expected[-1], exact_mode)
        expected.append(exact.sample(params))
    assert list(draw_tokens(ours, params, count, LOSSLESS)) == expected
    assert ours.position == exact.position == len(PROMPT) + count - 1
    assert equal_bits(ours._last, exact._last) and ours._native.tokens == exact._native.tokens
    assert equal_bits(ours.logits(PROMPT, exact_mode), exact.logits(PROMPT, exact_mode))
    counts = ours.drafting
    assert counts.tokens == count - 1
    assert counts.tokens == counts.verifications + counts.looked_up_right + counts.predicted_right
    return ours


@pytest.mark.parametrize("fixed", FIXED)
@pytest.mark.parametrize("params", [GREEDY, HOT])
@pytest.mark.parametrize(("family", "cache"), FAMILIES)
def test_the_tokens_and_the_cache_are_those_of_exact_mode(predicting, family, cache, params, fixed):
    counts = check(Engine.load(predicting(family), threads=2), cache, params, fixed).drafting
    assert (counts.looked_up > 0) == (fixed[0] > 0)
    if fixed == (0, 3):
        assert counts.predicted > 0
        # Where some were wrong they left no trace. (This Gemma hardly listens to its FFNs.)
        assert counts.predicted > counts.predicted_right or family == "gemma2"


@pytest.mark.parametrize("isa", _native.isas())
def test_every_instruction_set_and_number_of_threads(predicting, isa):
    for threads in (1, 3):
        check(Engine.load(predicting("llama"), threads=threads, isa=isa), None, HOT, (4, 3), 40)


def test_fp32_and_a_threshold_on_h(predicting, tmp_path):
    folder = make_folder(tmp_path / "hf", "llama", "drelu", activation_threshold=[0.05, 0.3])
    export_gguf(folder, tmp_path / "m.gguf", "f32")
    check(Engine.load(predicting("llama", tmp_path / "m.gguf"), compute="f32", threads=2), None, GREEDY, (3, 2))


@pytest.mark.parametrize("activation", ["dense", "reglu"])
def test_without_predictors_drafts_are_looked_up_only(tiny_gguf, activation):
    engine = Engine.load(tiny_gguf("llama", activation, "q4_0"), threads=2)
    counts = check(engine, None, GREEDY, (5, 5)).drafting
    assert counts.predicted == 0 < counts.looked_up_right  # a tiny model soon repeats itself
    assert counts.tokens > counts.verifications


def test_the_plan_of_its_own_changes_no_token(predicting):
    engine = Engine.load(predicting("llama"), threads=2)
    exact, ours = engine.session(256), engine.session(256)
    exact.prefill(PROMPT, "exact")
    ours.prefill(PROMPT, LOSSLESS)
    assert list(draw_tokens(ours, HOT, 200, LOSSLESS)) == list(draw_tokens(exact, HOT, 200, "exact"))


@pytest.mark.parametrize("fixed", FIXED)
def test_an_end_inside_of_a_draft(predicting, monkeypatch, fixed):
    engine = Engine.load(predicting("llama"), threads=2)
    session = engine.session(256)
    session.prefill(PROMPT, "exact")
    whole = list(draw_tokens(session, GREEDY, 100, "exact"))
    for end in sorted(set(whole)):
        first, ours = whole.index(end), engine.session(256)
        ours._ahead.fix(*fixed)
        monkeypatch.setattr(engine.tokenizer, "eos_ids", frozenset({end}))
        chunks = list(generate(engine, PROMPT, GREEDY, 100, LOSSLESS, session=ours))
        assert [chunk.token for chunk in chunks] == whole[: first + 1]
        assert chunks[-1].finish == "eos" and ours.position == len(PROMPT) + first


@pytest.mark.parametrize("stop", range(1, 40, 3))
def test_a_reader_who_leaves_finds_the_session_as_exact_mode_leaves_it(predicting, stop):
    engine = Engine.load(predicting("gemma3"), threads=2)
    sessions = {}
    for mode in ("exact", LOSSLESS):
        sessions[mode] = session = engine.session(256)
        session._ahead.fix(15, 3)
        chunks = generate(engine, PROMPT, GREEDY, 80, mode, ignore_eos=True, session=session)
        assert len(list(itertools.islice(chunks, stop))) == stop
        chunks.close()
    exact, ours = sessions["exact"], sessions[LOSSLESS]
    assert exact.position == ours.position == len(PROMPT) + stop - 1
    assert equal_bits(ours.decode(9, "exact"), exact.decode(9, "exact"))


def test_the_context_ends_inside_of_a_draft(predicting):
    engine = Engine.load(predicting("llama"), threads=2)
    for room in range(1, 8):
        sessions = [engine.session(len(PROMPT) + room) for _ in range(2)]
        for session in sessions:
            session.prefill(PROMPT, "exact")
        exact, ours = sessions
        ours._ahead.fix(15, 15)
        token, expected = ours.sample(GREEDY), list(draw_tokens(exact, GREEDY, room + 1, "exact"))
        drawn = [token]
        while ours.position < ours.context:
            drawn += ours.decode_ahead(drawn[-1], GREEDY, 100)
        assert drawn == expected
        with pytest.raises(UserError, match="do not fit the context"):
            ours.decode_ahead(3, GREEDY, 1)


def test_single_tokens_and_prompts_are_exact(predicting):
    engine = Engine.load(predicting("llama"), threads=2)
    a, b = engine.session(), engine.session()
    assert equal_bits(a.logits(PROMPT, LOSSLESS), b.logits(PROMPT, "exact"))
    assert equal_bits(a.decode(5, LOSSLESS), b.decode(5, "exact"))
    assert a.used(LOSSLESS) == LOSSLESS


def test_drafts_count_as_bytes_and_not_as_tokens(predicting):
    engine = Engine.load(predicting("llama"), threads=2)
    session = engine.session()
    session.prefill(PROMPT, LOSSLESS)
    traffic = {}
    for predicted in (0, 2):
        session._ahead.fix(0, predicted)
        engine.traffic(reset=True)
        assert session.decode_ahead(7, GREEDY, 3)
        traffic[predicted] = engine.traffic()
        session.truncate(len(PROMPT))
    assert (traffic[0].tokens, traffic[2].tokens) == (1, 3)
    assert traffic[2].bytes > 2 * traffic[0].bytes and traffic[2].selected is None


def slow_lookup(text: list[int], most: int) -> tuple[int, list[int]]:
    """All places and all lengths."""
    best = max(
        (
            (length, end)
            for end in range(1, len(text))
            for length in range(1, min(16, end) + 1)
            if text[end - length : end] == text[len(text) - length :]
        ),
        default=None,
    )
    if best is None:
        return 0, []
    longer = list(text)
    for _ in range(most):
        longer.append(longer[len(longer) - len(text) + best[1]])
    return best[0], longer[len(text) :]


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(0, 20))
def test_lookup_finds_the_latest_of_the_longest_ends(text, most):
    assert _native.lookup(text, most) == slow_lookup(text, most)


def plan_with(single: float, others: float | None = None):
    costs = _native.Costs()
    for _ in range(60):
        for rows in range(1, 17) if others is not None else (1,):
            costs.verified(rows, single if rows == 1 else others)
    return costs, _native.Plan(costs)


def test_the_plan_weighs_acceptance_against_cost():
    plan = _native.Plan(_native.Costs())
    assert plan.looked_up(9, 15) == 0 == plan.predicted(4)  # a single token's cost comes first
    _, plan = plan_with(0.010, 0.011)  # one more is nearly free
    assert plan.looked_up(9, 15) == 15 and plan.looked_up(9, 4) == 4 and plan.looked_up(1, 0) == 0
    _, plan = plan_with(0.010, 0.019)
    assert plan.looked_up(1, 3) == 0 < plan.looked_up(9, 3)  # what was found by one token is seldom right
    for _ in range(200):
        plan.judged(9, False)
    assert plan.looked_up(9, 1) == 0 < plan.looked_up(17, 1)  # lookups of other lengths have their own account
    for _ in range(200):
        plan.judged(1, True)
        plan.judged(2, True)
        plan.judged(4, True)
        plan.judged(9, True)
    assert plan.looked_up(1, 15) == 15


def test_verifications_that_were_not_measured_are_hoped_to_be_cheap():
    costs, plan = plan_with(0.010)
    assert plan.looked_up(16, 15) > 4
    costs.verified(2, 0.010)
    for rows in range(3, 17):
        costs.verified(rows, 0.100)
    assert plan.looked_up(16, 15) == 1


def test_a_verification_that_was_slow_once_is_tried_again():
    costs, plan = plan_with(0.010, 0.200)
    assert plan.looked_up(16, 15) == 0
    for _ in range(600):
        costs.verified(1, 0.010)
    assert plan.looked_up(16, 15) > 0


def test_predicted_drafts_are_made_where_they_pay_and_tried_where_they_do_not():
    costs, plan = plan_with(0.010, 0.011)
    assert plan.predicted(4) == 1  # to learn what one costs
    costs.drafted(0.001)
    assert plan.predicted(4) == 4 and plan.predicted(0) == 0
    for _ in range(60):
        costs.drafted(0.012)
    tried = [plan.predicted(4) for _ in range(256)]
    assert tried.count(1) == 2 and tried.count(0) == 254
