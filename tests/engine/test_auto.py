"""The automatic modes choose by counts of the sequence's own tokens, and nothing else changes what they give."""

import numpy as np
import pytest
from agreement import equal_bits

from turbosparse.engine import Engine
from turbosparse.errors import UserError
from turbosparse.model.shapes import shape_config
from turbosparse.model.synthetic import rates_for, write_synthetic
from turbosparse.model.synthetic_predictor import Prediction

COUNTED = 16  # tokens before the choice (csrc/choice.h)
TOKENS = np.random.default_rng(7).integers(3, 40000, size=(5, 40)).tolist()


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    """synthetic(sparsity, gate_rate, prediction) -> engine of a small model with these rates."""

    def load(sparsity: float, gate_rate: float, prediction: Prediction | None = None, threads: int = 2) -> Engine:
        path = tmp_path_factory.mktemp("auto") / "m.gguf"
        config = shape_config("smollm2-135m", "drelu", 2)
        write_synthetic(path, "m", config, rates_for(sparsity, gate_rate), "q4_0", prediction=prediction)
        return Engine.load(path, threads=threads)

    return load


@pytest.mark.parametrize(("sparsity", "gate_rate", "chosen"), [(0.9, 0.25, "exact"), (0.05, 0.97, "dense")])
def test_the_choice_follows_the_rates_and_changes_no_bit(synthetic, sparsity, gate_rate, chosen):
    engine = synthetic(sparsity, gate_rate)
    assert engine.automatic_modes == ("auto",)
    auto, dense = engine.session(), engine.session()
    assert equal_bits(auto.prefill(TOKENS[0][:9], "auto"), dense.prefill(TOKENS[0][:9], "dense"))
    for index, token in enumerate(TOKENS[0]):
        assert auto.used("auto") == ("exact" if index < COUNTED else chosen)
        engine.traffic(reset=True)
        logits = auto.decode(token, "auto")
        read = engine.traffic(reset=True).bytes
        assert equal_bits(logits, dense.decode(token, "dense"))
        dense_read = engine.traffic().bytes
        assert (read == dense_read) == (index >= COUNTED and chosen == "dense")
    assert auto.choices == (chosen,) * 2
    auto.reset()
    assert auto.choices == ("exact",) * 2
    with pytest.raises(UserError, match="mode auto-predicted"):
        auto.decode(5, "auto-predicted")


def test_a_dense_model_has_no_choice(tiny_gguf):
    engine = Engine.load(tiny_gguf("llama", "dense", "q8_0"))
    a, b = engine.session(), engine.session()
    assert equal_bits(a.prefill([3, 4, 5], "auto"), b.prefill([3, 4, 5], "dense")) and a.used("auto") == "dense"
    assert equal_bits(a.decode(6, "auto"), b.decode(6, "dense"))


def test_predictors_are_chosen_where_they_may_be_and_cost_less(synthetic):
    engine = synthetic(0.9, 0.25, Prediction())
    assert engine.automatic_modes == ("auto", "auto-predicted")
    auto, exact = engine.session(), engine.session()
    for index, token in enumerate(TOKENS[0]):
        assert equal_bits(auto.decode(token, "auto-predicted"), exact.decode(token, "exact")) == (index < COUNTED)
        if index == COUNTED:
            exact, auto = engine.session(), engine.session()
            break
    for token in TOKENS[0]:
        auto.decode(token, "auto-predicted")
    assert auto.used("auto-predicted") == "predicted"
    plain = engine.session()
    for token in TOKENS[0]:
        plain.decode(token, "auto")
    assert plain.used("auto") == "exact"
    # What was chosen in one of the modes is not used in the other.
    plain.decode(TOKENS[1][0], "auto-predicted")
    assert plain.choices == ("exact",) * 2
    # A predictor that costs as much as the FFN is worth nothing.
    heavy = synthetic(0.9, 0.25, Prediction(1.2, 1.0)).session()
    for token in TOKENS[0]:
        heavy.decode(token, "auto-predicted")
    assert heavy.used("auto-predicted") == "exact"


@pytest.mark.parametrize("mode", ["auto", "auto-predicted"])
def test_together_as_alone_while_others_have_chosen_already(synthetic, mode):
    engine = synthetic(0.9, 0.25, Prediction())
    alone = []
    for tokens in TOKENS:
        session = engine.session()
        alone.append(np.stack([session.decode(token, mode) for token in tokens]))
    sessions = [engine.session() for _ in TOKENS]
    for index, session in enumerate(sessions):  # sequence i is 5 i tokens ahead
        for token in TOKENS[index][: 5 * index]:
            session.decode(token, mode)
    for step in range(20):
        logits = engine.decode_batch(sessions, [TOKENS[i][5 * i + step] for i in range(len(TOKENS))], mode)
        for index in range(len(TOKENS)):
            assert equal_bits(logits[index], alone[index][5 * index + step]), (step, index)


def test_reading_cannot_choose(synthetic):
    session = synthetic(0.9, 0.25, Prediction()).session()
    with pytest.raises(UserError, match="for decoding"):
        session.logits([3, 4], "auto-predicted")
    assert equal_bits(session.logits([3, 4], "auto")[-1], session._last)
