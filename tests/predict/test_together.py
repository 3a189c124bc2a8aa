"""Predictors of all layers trained at once, on the layers' own loss and on the model's output."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from turbosparse.engine import Engine
from turbosparse.errors import UserError
from turbosparse.model.config import ModelConfig
from turbosparse.model.gguf import GGUFFile
from turbosparse.predict import Wish, train_predictors
from turbosparse.predict.decoder import Decoder, embed, logits
from turbosparse.predict.end_to_end import Aim, _Decide, refine
from turbosparse.predict.finish import by_price, by_shift, curves, stored
from turbosparse.predict.pace import by_clock, by_steps, rate, shares
from turbosparse.predict.sensitivity import sensitivities
from turbosparse.predict.stack import Stack
from turbosparse.predict.together import Ground, Text, learn
from turbosparse.predict.verdict import judge
from turbosparse.predict.whole import Whole

CPU = torch.device("cpu")
KINDS = (Type.Q8_0, Type.Q8_0)
WINDOWS = torch.from_numpy(np.random.default_rng(5).integers(3, 300, size=(24, 32)))


def nothing(*done: float) -> None:
    """No progress to show."""


@pytest.fixture
def text(tmp_path):
    """About 6000 tokens of words that are drawn at random."""
    rng = np.random.default_rng(0)
    words = ["fox", "dog", "the", "quick", "path", "return", "12345", "über", "日本", "x + y"]
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": " ".join(rng.choice(words, 60))}) for _ in range(60)))
    return path


@pytest.fixture
def whole(tiny_gguf):
    with GGUFFile.open(tiny_gguf("llama", "drelu")) as file:
        yield Whole(file, ModelConfig.from_gguf(file), CPU)


@pytest.fixture
def ground(whole, tiny_gguf):
    with GGUFFile.open(tiny_gguf("llama", "drelu")) as file:
        worth = sensitivities(file, whole.config, WINDOWS[:4].tolist(), CPU, nothing)
    return Ground(whole, WINDOWS[:8], worth)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_a_whole_model_is_its_layers_one_after_the_other(tiny_gguf, family):
    with GGUFFile.open(tiny_gguf(family, "drelu")) as file, torch.inference_mode():
        config = ModelConfig.from_gguf(file)
        whole = Whole(file, config, CPU)
        stream = torch.stack([embed(file, config, window) for window in WINDOWS[:2].tolist()])
        fired = []
        for layer in range(config.n_layers):
            stream, of_layer = Decoder(file, config, layer, CPU)(stream)
            fired.append(of_layer)
        torch.testing.assert_close(whole.logits(whole(WINDOWS[:2])), logits(file, config, CPU)(stream))
        for tokens, expected in zip(whole.watch(WINDOWS[:2]), fired, strict=True):
            torch.testing.assert_close(tokens.x.float(), expected.x.flatten(0, 1), rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(tokens.mass.float(), expected.h.abs().flatten(0, 1), rtol=1e-3, atol=1e-3)


def test_narrow_layers_of_a_stack_stay_narrow(whole, ground):
    ranks = [32, 64] * whole.config.n_layers
    ranks = ranks[: whole.config.n_layers]
    stack = ground.begin(ranks, KINDS, 0)
    before = [matrix.clone() for matrix in stack.layer(0)]
    learn(whole, ground, [stack], Text(WINDOWS, 4, 0), by_steps(6), nothing)
    rows, columns = stack.parameters
    assert not rows[0, 32:].any() and not columns[0, :, 32:].any()
    assert rows[1, 32:].all(dim=1).all()
    for old, new in zip(before, stack.layer(0), strict=True):
        assert old.shape == new.shape and not torch.equal(old, new)


def test_a_stack_learns_what_fires_in_every_layer(whole, ground):
    def selected(stack: Stack) -> float:
        predictors = stored(stack, ground)
        seen = whole.watch(WINDOWS[16:])
        found = curves(predictors, ground, seen)
        index, _ = by_price(found, 0.95)
        return float(np.mean([layer.sums[0, at] for layer, at in zip(found, index, strict=True)]))

    ranks = [64] * whole.config.n_layers
    stack, narrow = ground.begin(ranks, KINDS, 0), ground.begin([32] * len(ranks), KINDS, 0)
    before = selected(stack)
    steps = learn(whole, ground, [stack, narrow], Text(WINDOWS[:16], 4, 0), by_steps(150), nothing)
    assert steps == 150
    assert selected(stack) < 0.8 * before
    assert selected(stack) < selected(narrow)


def test_end_to_end_the_output_comes_nearer_for_as_many_neurons(whole, ground):
    stack = ground.begin([32] * whole.config.n_layers, KINDS, 0)
    learn(whole, ground, [stack], Text(WINDOWS, 4, 0), by_steps(100), nothing)
    found = curves(stored(stack, ground), ground, whole.watch(WINDOWS))

    def at_recall(recall: float) -> tuple[list[float], float]:
        index, price = by_price(found, recall)
        return [float(layer.score[at]) for layer, at in zip(found, index, strict=True)], price

    thresholds, price = at_recall(0.9)
    before = at_thresholds(whole, ground, stack, thresholds)
    refined = stack.clone()
    aim = Aim(0.8 * before.selected_all, price, 0.3, 3e-3)
    assert refine(whole, ground, refined, thresholds, Text(WINDOWS, 8, 1), by_steps(100), aim, nothing) == 100
    after = at_thresholds(whole, ground, refined, thresholds)
    assert after.selected_all < 0.9 * before.selected_all
    fewer = (at_thresholds(whole, ground, stack, at_recall(recall)[0]) for recall in np.linspace(0.9, 0.4, 20))
    as_few = next(verdict for verdict in fewer if verdict.selected_all <= 1.05 * after.selected_all)
    assert after.kl < 0.8 * as_few.kl


def at_thresholds(whole, ground, stack, thresholds):
    chosen = [
        dataclasses.replace(each, threshold=score)
        for each, score in zip(stored(stack, ground), thresholds, strict=True)
    ]
    return judge(whole, chosen, WINDOWS)


def test_a_decision_has_the_slope_of_a_sigmoid_and_costs_a_neuron():
    score = torch.tensor([[2.0, -2.0, 0.5, -9.0]], requires_grad=True)
    h = torch.tensor([[3.0, 5.0, 7.0, 11.0]], requires_grad=True)
    always = torch.tensor([False, False, False, True])
    kept = _Decide.apply(score, h, always, torch.zeros(1, 4))
    assert kept.tolist() == [[3.0, 0.0, 7.0, 11.0]]
    (kept * torch.tensor([[1.0, -1.0, 0.0, 1.0]])).sum().backward()
    assert h.grad.tolist() == [[1.0, 0.0, 0.0, 1.0]]
    slope = 4 * torch.sigmoid(score / 2) * (1 - torch.sigmoid(score / 2))
    expected = slope * torch.tensor([[3.0 + 1, -5.0 + 1, 0.0 + 1, 0.0]])
    torch.testing.assert_close(score.grad[:, :3], expected[:, :3])
    assert score.grad[0, 3] == 0


def test_predictors_that_select_everything_change_nothing(whole, ground):
    stack = ground.begin([32] * whole.config.n_layers, KINDS, 0)
    everything = [dataclasses.replace(each, threshold=-1e9) for each in stored(stack, ground)]
    verdict = judge(whole, everything, WINDOWS[:5])
    assert verdict.kl == pytest.approx(0, abs=1e-6)
    assert verdict.nats[0] == pytest.approx(verdict.nats[1], abs=1e-6)
    assert verdict.kept == (1.0,) * whole.config.n_layers
    nothing_selected = [dataclasses.replace(each, threshold=1e9) for each in everything]
    assert judge(whole, nothing_selected, WINDOWS[:5]).kl > 1e-4


def test_thresholds_move_together_until_they_keep_what_is_asked(whole, ground):
    stack = ground.begin([32] * whole.config.n_layers, KINDS, 0)
    found = curves(stored(stack, ground), ground, whole.watch(WINDOWS))
    base = [float(layer.score[len(layer.score) // 2]) for layer in found]
    index = by_shift(found, base, 0.9)
    kept = [layer.mass[at] for layer, at in zip(found, index, strict=True)]
    assert np.mean(kept) >= 0.9
    shifts = [layer.score[at] - score for layer, at, score in zip(found, index, base, strict=True)]
    assert max(shifts) - min(shifts) < 0.2


def test_a_training_ends_by_steps_or_by_the_clock(monkeypatch):
    assert [round(done, 2) for done in shares(by_steps(4))] == [0.0, 0.25, 0.5, 0.75]
    assert len(list(shares(by_steps(0)))) == 1
    times = iter([10.0, 11.0, 12.5, 14.0, 15.5])
    monkeypatch.setattr("turbosparse.predict.pace.time.monotonic", lambda: next(times))
    assert [round(done, 2) for done in shares(by_clock(5.0))] == [0.0, 0.2, 0.5, 0.8]
    assert rate(0.1) == 1.0 and rate(0.0) < 0.1 and rate(1.0) < 0.01


def test_a_text_is_read_as_a_whole_before_it_is_read_again():
    windows = torch.arange(12)[:, None].repeat(1, 3)
    text = iter(Text(windows, 4, 0))
    for _ in range(2):
        seen = torch.cat([next(text)[:, 0] for _ in range(3)])
        assert sorted(seen.tolist()) == list(range(12))


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("wish", [Wish(share=0.5, together=True, epochs=3), Wish(rank=32, end_to_end=5, epochs=1)])
def test_the_command_writes_what_runs_and_promises_what_was_measured(tiny_gguf, text, tmp_path, wish, group):
    out = tmp_path / "out.gguf"
    report = train_predictors(tiny_gguf("qwen3", "drelu", "q8_0", group), text, out, wish)
    predictor = Engine.load(out).config.predictor
    assert predictor.recall == pytest.approx([min(layer.mass_kept, 0.9999) for layer in report.layers])
    assert predictor.ranks == tuple(layer.rank for layer in report.layers)
    assert report.mean("mass_kept") == pytest.approx(0.98, abs=0.02)
    if wish.rank is None:
        assert 0.3 < report.mean("bytes_share") <= 0.5
    session = Engine.load(out).session()
    assert np.isfinite(session.decode(5, "predicted")).all()


def test_what_is_kept_is_not_trained(tiny_gguf):
    with pytest.raises(UserError, match="--keep trains nothing"):
        Wish(keep=True, end_to_end=3)
