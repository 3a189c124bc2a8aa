"""Timed phases of decoding: every byte and every moment in one of them, nothing changed by looking."""

import time

import numpy as np
import pytest
from factories import add_predictor, random_predictor
from gguf import GGMLQuantizationType as Type

from turbosparse.bench.phases import BETWEEN, WHOLE, PhaseTimer, time_phases
from turbosparse.engine import Engine
from turbosparse.model.config import ModelConfig
from turbosparse.model.gguf import GGUFFile

EVERYWHERE = {"qkv", "attention", "attention_output", "head", "other"}
EXPECTED = {
    "dense": {"gate", "up", "down"},
    "exact": {"gate", "up_open", "down_firing"},
    # The first layer has no predictor, so it is computed in exact mode.
    "predicted": {"gate", "up_open", "down_firing", "predictor", "gate_selected"},
}


@pytest.fixture(scope="module")
def engine(tiny_gguf, tmp_path_factory):
    source = tiny_gguf("llama", "drelu", "q4_0")
    with GGUFFile.open(source) as file:
        config = ModelConfig.from_gguf(file)
    predictor = random_predictor(config.n_layers, config.hidden_size, config.ffn_size, 32, False, without=0)
    path = add_predictor(source, tmp_path_factory.mktemp("phases") / "m.gguf", predictor, Type.Q4_0)
    return Engine.load(path, threads=2)


def decode(engine: Engine, mode: str, tokens: int = 5) -> np.ndarray:
    session = engine.session()
    session.prefill([5, 6, 7], mode)
    return np.stack([session.decode(8 + i, mode) for i in range(tokens)])


@pytest.mark.parametrize("mode", EXPECTED)
def test_phases_hold_all_time_and_all_bytes(engine, mode):
    engine.traffic(reset=True)
    engine.phases(reset=True)
    engine.time_phases()
    begun = time.perf_counter()
    decode(engine, mode)
    elapsed = time.perf_counter() - begun
    engine.time_phases(False)
    phases, traffic = engine.phases(), engine.traffic()
    assert {name for name, phase in phases.items() if phase.seconds} == EVERYWHERE | EXPECTED[mode]
    assert all(0 <= phase.waited <= phase.seconds for phase in phases.values())
    assert 0 < sum(phase.seconds for phase in phases.values()) <= elapsed
    config = engine.config
    embedding = config.hidden_size // 32 * 34 * traffic.tokens  # a row a token, of q8_0
    # Keys and values in float16 of the 4 to 8 tokens that the five decoded ones see.
    seen = (4 + 5 + 6 + 7 + 8) * config.n_layers * config.n_kv_heads * config.head_dim * 2 * 2
    assert phases["attention"].bytes == seen
    weights = sum(phase.bytes for phase in phases.values()) - seen
    assert weights == traffic.bytes - embedding


def test_timing_changes_no_bit_and_is_off_by_default(engine):
    engine.phases(reset=True)
    before = decode(engine, "predicted")
    assert all(phase.seconds == phase.bytes == 0 for phase in engine.phases().values())
    engine.time_phases()
    timed = decode(engine, "predicted")
    engine.time_phases(False)
    assert np.array_equal(before.view(np.uint32), timed.view(np.uint32))


def test_prompts_are_not_timed(engine):
    engine.phases(reset=True)
    engine.time_phases()
    engine.session().prefill([5, 6, 7], "exact")
    engine.time_phases(False)
    assert all(phase.seconds == 0 for phase in engine.phases().values())


def test_shares_of_a_limit_that_is_read_between(engine, tiny_gguf):
    sliding = Engine.load(tiny_gguf("gemma3", "dense", "q8_0"), threads=2)
    prompt = list(range(3, 3 + 60))  # its sliding layers have forgotten the first of them
    timers = [PhaseTimer(engine, "exact", prompt), PhaseTimer(sliding, "dense", prompt, "dense-twin")]
    done = []
    rows = time_phases(timers, 3, lambda *progress: done.append(progress))
    assert done == [(i, 6) for i in range(1, 7)]
    assert {row.mode for row in rows} == {"exact", "dense-twin"}
    for row in rows:
        reads = row.bytes > 0
        assert row.ms >= row.waiting_ms >= 0 and (row.gb_s is not None) == (row.of_limit is not None) == reads
        assert row.phase != BETWEEN or not reads
    exact = {row.phase: row for row in rows if row.mode == "exact"}
    parts = [row.bytes for name, row in exact.items() if name != WHOLE]
    assert exact[WHOLE].bytes == pytest.approx(sum(parts), rel=0.2)  # medians
    assert timers[0].limit > 0.01 and engine.read_rate() > 0.01
