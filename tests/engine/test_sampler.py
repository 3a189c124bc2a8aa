"""How the next token is drawn (csrc/sampler.cpp), against a slow reference."""

import math

import numpy as np
import pytest

from turbosparse import _native
from turbosparse.engine import SamplingParams
from turbosparse.errors import UserError


def test_greedy_takes_the_lowest_id_among_equals_and_never_nan():
    logits = np.array([1.0, 3.0, 3.0, np.nan], np.float32)
    assert _native.sample(logits, [], 0, 0.0, 0, 1.0, 0.0, 1.0, 0) == 1


def test_draws_follow_the_distribution_and_depend_on_seed_and_position_alone():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))

    def draw(position: int, **changes: float) -> int:
        settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "seed": 11}
        settings.update(changes)
        return _native.sample(logits, [], position, **settings)

    draws = [draw(position) for position in range(20000)]
    assert draws == [draw(position) for position in range(20000)]
    shares = np.bincount(draws, minlength=4) / len(draws)
    assert np.abs(shares - [0.5, 0.3, 0.15, 0.05]).max() < 0.015  # over four standard errors
    assert draws[:50] != [draw(position, seed=12) for position in range(50)]
    assert {draw(position, top_k=2) for position in range(300)} == {0, 1}
    assert {draw(position, top_p=0.75) for position in range(300)} == {0, 1}
    assert {draw(position, min_p=0.2) for position in range(300)} == {0, 1, 2}
    cold = np.bincount([draw(position, temperature=0.25) for position in range(2000)], minlength=4) / 2000
    assert cold[0] > 0.85


def kept_tokens(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> dict[int, float]:
    """The slow reference of the filters: sort everything, cut; the weights of what is left."""
    scaled = np.nan_to_num(logits, nan=-np.inf, neginf=-np.inf) / np.float32(temperature)
    order = np.lexsort((np.arange(len(logits)), -scaled))[: top_k or None]
    weight = np.exp(scaled[order].astype(np.float64) - float(scaled[order[0]]))
    before = np.cumsum(weight) - weight
    kept = (before < np.float32(top_p) * weight.sum()) & (weight >= np.float32(min_p)) & (weight > 0)
    kept[0] = True
    kept = np.logical_and.accumulate(kept)
    return dict(zip(order[kept].tolist(), weight[kept].tolist(), strict=True))


def race(weights: dict[int, float], seed: int, position: int) -> int:
    """The token whose exponential time, by SplitMix64 over seed, position and token, is the first."""
    whole = (1 << 64) - 1

    def mix(z: int) -> int:
        z = (z + 0x9E3779B97F4A7C15) & whole
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & whole
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & whole
        return z ^ (z >> 31)

    key = mix(seed) ^ mix(~position & whole)
    return min(weights, key=lambda id: -math.log1p(-(mix((key + id) & whole) >> 11) * 2.0**-53) / weights[id])


@pytest.mark.parametrize("top_k", [0, 7, 200])
@pytest.mark.parametrize(("top_p", "min_p"), [(1.0, 0.0), (0.9, 0.0), (1.0, 0.05), (0.7, 0.01)])
@pytest.mark.parametrize("spread", [0.0, 1.0, 8.0])
def test_a_draw_is_the_race_of_all_that_the_filters_keep(top_k, top_p, min_p, spread):
    rng = np.random.default_rng(1)
    logits = (spread * rng.standard_normal(3001)).astype(np.float32)
    logits[rng.integers(3000, size=40)] = logits[7]  # equals
    logits[rng.integers(3000, size=40)] = [np.nan, -np.inf] * 20
    kept = kept_tokens(logits, 0.8, top_k, top_p, min_p)
    for position in range(100):
        drawn = _native.sample(logits, [], position, 0.8, top_k, top_p, min_p, 1.0, 11)
        assert drawn == race(kept, 11, position)


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1.0])
def test_what_is_no_number_is_never_drawn(temperature):
    nan, inf = np.nan, np.inf
    for logits, expected in (([nan, -inf, 2.0], 2), ([nan, nan], 0), ([-inf, -inf], 0), ([1.0, inf, inf], 1)):
        drawn = _native.sample(np.array(logits, np.float32), [], 3, temperature, 0, 1.0, 0.0, 1.0, 0)
        assert drawn == expected


def test_logits_that_differ_a_little_mostly_draw_the_same_token():
    """In at least (1 - d) / (1 + d) of the draws, d half the distance of the distributions: so races agree."""
    rng = np.random.default_rng(2)
    exact = (2 * rng.standard_normal(2000)).astype(np.float32)
    draft = exact + (0.2 * rng.standard_normal(2000)).astype(np.float32)
    p, q = (np.exp(each) / np.exp(each).sum() for each in (exact, draft))
    distance = np.abs(p - q).sum() / 2
    draws = [
        [_native.sample(each, [], position, 1.0, 0, 1.0, 0.0, 1.0, 5) for position in range(4000)]
        for each in (exact, draft)
    ]
    same = np.mean([a == b for a, b in zip(*draws, strict=True)])
    assert distance > 0.05
    assert same > (1 - distance) / (1 + distance) - 0.02  # over three standard errors


def test_the_repetition_penalty_lowers_what_was_said():
    logits = np.array([2.0, 1.9, -1.0], np.float32)
    assert _native.sample(logits, [0, 0], 0, 0.0, 0, 1.0, 0.0, 1.5, 0) == 1
    assert _native.sample(logits, [0], 0, 0.0, 0, 1.0, 0.0, 1.01, 0) == 0


@pytest.mark.parametrize("change", [{"temperature": -1.0}, {"top_p": 0.0}, {"min_p": 2.0}, {"repetition_penalty": 0.0}])
def test_impossible_sampling_settings(change):
    with pytest.raises(UserError, match=next(iter(change))):
        SamplingParams(**change)
