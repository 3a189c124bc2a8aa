"""Predictors from a model and a text: the collecting decoder, the fit, the thresholds, the file, the run."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from agreement import logits_error
from gguf import GGMLQuantizationType as Type
from gguf_files import edit_gguf
from safetensors.numpy import load_file, save_file

from turbosparse.documents import read_documents
from turbosparse.engine import Engine
from turbosparse.errors import UserError
from turbosparse.model.config import ModelConfig
from turbosparse.model.gguf import GGUFFile
from turbosparse.model.quantize import dequantize
from turbosparse.predict import Wish, train, train_predictors
from turbosparse.predict.calibrate import price_for
from turbosparse.predict.collect import Collector
from turbosparse.predict.decoder import Decoder, embed, logits
from turbosparse.predict.fit import Tokens, fit, nats, rounded, whitening
from turbosparse.predict.folder import FILE, attach, load_folder, save_folder
from turbosparse.predict.measure import Curve, curve, edges, low_rank
from turbosparse.predict.ranks import cost, share_out, tried
from turbosparse.predict.sensitivity import sensitivities
from turbosparse.predict.sinks import always_selecting, sinks
from turbosparse.predict.write import StoredPredictor

CPU = torch.device("cpu")
TOKENS = [int(token) for token in np.random.default_rng(3).integers(3, 300, size=70)]
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"]
GROUPS = [*((family, 1) for family in FAMILIES), ("llama", 2), ("gemma2", 3)]
"""Of neurons that share a gate."""


@pytest.fixture
def text(tmp_path):
    """About 6000 tokens of words that are drawn at random."""
    rng = np.random.default_rng(0)
    words = ["fox", "dog", "the", "quick", "path", "return", "12345", "über", "日本", "x + y"]
    path = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": " ".join(rng.choice(words, 60))}) for _ in range(60)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("activation", ["drelu", "reglu"])
@pytest.mark.parametrize(("family", "group"), GROUPS)
def test_the_collecting_decoder_computes_what_the_engine_does(tiny_gguf, family, group, activation):
    path = tiny_gguf(family, activation, "f32", group)
    with GGUFFile.open(path) as file, torch.inference_mode():
        config = ModelConfig.from_gguf(file)
        stream = torch.stack([embed(file, config, TOKENS)])
        for layer in range(config.n_layers):
            stream, _ = Decoder(file, config, layer, CPU)(stream)
        ours = logits(file, config, CPU)(stream[0])
    theirs = Engine.load(path, compute="f32").session().logits(TOKENS, "exact")
    assert logits_error(ours.numpy(), theirs).max() < 1e-4


def tokens_of_two_directions(count: int, neurons: int = 64) -> Tokens:
    """Neurons that fire where both of two directions out of 16 are positive: what the form can express."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((count, 32)) + 0.5
    first, second = (rng.standard_normal((32, 8))[:, rng.integers(8, size=neurons)] for _ in range(2))
    mass = np.maximum(x @ first, 0) * np.maximum(x @ second, 0)
    return Tokens(x.astype(np.float16), mass.astype(np.float16))


def test_a_fitted_predictor_finds_what_fires_on_tokens_it_has_not_seen():
    tokens = tokens_of_two_directions(9000)
    seen, tuned, new = (Tokens(tokens.x[part], tokens.mass[part]) for part in np.split(np.arange(9000), [7000, 8000]))
    worth = torch.full((64,), 1e-6)
    scores = low_rank(*fit(seen, worth, 32, Type.Q8_0, 200, 0, CPU))
    tried_scores = edges(tuned, scores, CPU)
    on_tuned, on_new = (curve(part, scores, worth, tried_scores) for part in (tuned, new))
    found = on_new.quality(on_tuned.best(price_for([on_tuned], 0.98)), 3, 32, 0.5)
    assert (found.layer, found.rank, found.bytes_share) == (3, 32, 0.5)
    assert found.mass_kept == pytest.approx(0.98, abs=0.01)
    blind = 0.98 / found.active  # what has to be selected at random for the same
    assert found.selected < 0.6 * blind


def test_a_dimension_that_a_norm_silences_does_not_cost_its_neighbours():
    """They share a block of Q4_0 with it, whose scale would be that of its useless weights."""
    tokens = tokens_of_two_directions(3000)
    silenced = tokens.x.copy()
    silenced[:, 5] = 1e-4 * np.random.default_rng(2).standard_normal(3000)
    fc1, _ = fit(Tokens(silenced, tokens.mass), torch.full((64,), 1e-6), 32, Type.Q4_0, 100, 0, CPU)
    largest = fc1.abs().max(0).values
    assert largest[5] < largest.median()


@pytest.mark.parametrize("tokens", [300, 120, 20])
def test_whitening_never_enlarges_what_its_inputs_do_not_have(tokens):
    generator = torch.Generator().manual_seed(0)
    white = whitening(torch.randn(tokens, 256, generator=generator))
    other = torch.randn(500, 256, generator=generator) @ white
    assert other.square().mean() < 10


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q8_0, Type.F16])
def test_a_neuron_that_makes_attention_sinks_is_always_selected(kind):
    largest = torch.full((256,), 1.0)
    largest[[7, 100]] = 3000.0
    worth = torch.full((256,), 1e-4)
    always = sinks(largest, worth)
    assert always.nonzero().flatten().tolist() == [7, 100]
    assert not sinks(torch.ones(256), worth).any()
    assert sinks(3000 * torch.rand(256), torch.ones(256)).sum() == 4  # one of 64, however many cost as much
    rng = np.random.default_rng(0)
    fc1, fc2 = (np.float32(rng.standard_normal(shape)) for shape in ((32, 64), (256, 32)))
    before = StoredPredictor.of(fc1, fc2, (kind, kind), 0.5)
    x, new = (torch.from_numpy(np.float32(rng.standard_normal((500, 64)))) for _ in range(2))
    after = always_selecting(before, always, x)
    assert np.array_equal(after.fc2[~always.numpy()], before.fc2[~always.numpy()]) and after.threshold == 0.5
    first, second = map(torch.from_numpy, after.matrices())
    score = torch.relu(new @ first.T) @ second.T
    assert score[:, always].min() > score[:, ~always].max()


def test_a_curve_counts_what_every_threshold_selects():
    rng = np.random.default_rng(2)
    mass = np.maximum(rng.standard_normal((300, 8)), 0).astype(np.float16)
    tokens, worth = Tokens(np.float16(rng.standard_normal((300, 8))), mass), torch.rand(8)
    fc1, fc2 = torch.randn(32, 8), torch.randn(8, 32)
    score = (torch.relu(torch.from_numpy(tokens.x).float() @ fc1.T) @ fc2.T).numpy()
    # Other tokens set the thresholds, so that scores lie below and above them all.
    tried_scores = edges(Tokens(tokens.x[:40], mass[:40]), low_rank(fc1, fc2), CPU)
    found = curve(tokens, low_rank(fc1, fc2), worth, tried_scores)
    held = mass.astype(np.float64)
    each = np.stack([np.ones_like(held), held > 0, held, nats(torch.from_numpy(held), worth.double()).numpy()])
    assert found.whole == pytest.approx(each.sum((1, 2)) / 300)
    assert np.all(np.diff(tried_scores) > 0)
    for index in (0, len(tried_scores) // 3, len(tried_scores) // 2, -1):
        assert found.sums[:, index] == pytest.approx(each[:, score >= tried_scores[index]].sum(1) / 300)
    middle = len(tried_scores) // 2
    quality = found.quality(middle, 1, 32, 0.1)
    chosen = score >= tried_scores[middle]
    assert quality.mass_kept == pytest.approx(held[chosen].sum() / held.sum())
    assert quality.recall == pytest.approx((chosen & (held > 0)).sum() / (held > 0).sum())
    assert quality.selected == pytest.approx(chosen.sum() / (held > 0).sum())
    assert quality.nats_lost == pytest.approx(each[3][~chosen].sum() / 300)


def test_no_neuron_costs_more_than_the_limit_of_what_sensitivities_say():
    assert nats(torch.tensor([0.1, 2.0, 900.0]), torch.tensor([1.0, 0.125, 7.0])).tolist() == pytest.approx(
        [0.01, 0.5, 1.0]
    )


def stairs(nats_kept: list[float], mass: list[float]) -> Curve:
    """Thresholds 0, 1, ... that select ever fewer of as many neurons."""
    count = len(nats_kept)
    sums = np.array([np.arange(count, 0, -1.0), np.arange(count, 0, -1.0), mass, nats_kept])
    return Curve(np.arange(count, dtype=np.float32), sums, sums[:, 0])


def test_one_price_loses_mass_where_it_costs_least():
    dear, cheap = stairs([4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0]), stairs([0.4, 0.3, 0.2, 0.1], [4.0, 3.0, 2.0, 1.0])
    # 5 of 8 are asked for: all of the dear layer's, and the fewest of the cheap one's.
    price = price_for([dear, cheap], 0.6)
    assert 0.1 < price < 1.0 and (dear.best(price), cheap.best(price)) == (0, 3)
    assert (dear.best(price_for([dear, cheap], 1.0)), cheap.best(price_for([dear, cheap], 1.0))) == (0, 0)
    assert cost(cheap, 0.05) == pytest.approx(0.05 * 4) and cost(cheap, 0.3) == pytest.approx(0.3 + 0.3)


def test_a_layer_that_never_fires_selects_nothing_much():
    tokens = Tokens(np.ones((40, 8), np.float16), np.zeros((40, 4), np.float16))
    ones = low_rank(torch.ones(32, 8), torch.ones(4, 32))
    found = curve(tokens, ones, torch.ones(4), edges(tokens, ones, CPU))
    assert price_for([found], 0.98) > 0
    quality = found.quality(0, 0, 32, 0.1)
    assert (quality.mass_kept, quality.recall, quality.selected, quality.nats_lost) == (1.0, 1.0, 0.0, 0.0)


@pytest.mark.parametrize(("family", "group"), GROUPS)
def test_sensitivities_are_the_squared_gradients_of_the_whole_model(tiny_gguf, family, group):
    pieces = [TOKENS, TOKENS[::-1]]
    with GGUFFile.open(tiny_gguf(family, "drelu", "f32", group)) as file:
        config = ModelConfig.from_gguf(file)
        worth = sensitivities(file, config, pieces, CPU, lambda part: None)
        generator, squares = torch.Generator().manual_seed(0), torch.zeros(config.n_layers, config.ffn_size)
        for piece in pieces:
            stream, taps = embed(file, config, piece)[None].requires_grad_(), []
            for layer in range(config.n_layers):
                stream, fired = Decoder(file, config, layer, CPU)(stream)
                taps.append(fired.h)
            log_p = torch.log_softmax(logits(file, config, CPU)(stream[0]), -1)
            drawn = torch.multinomial(log_p.exp(), 1, generator=generator)
            gradients = torch.autograd.grad(log_p.gather(1, drawn).sum(), taps)
            squares += torch.stack([gradient[0].square().sum(0) for gradient in gradients])
    assert torch.allclose(torch.stack(worth), squares / (2 * 2 * len(TOKENS)), rtol=1e-3, atol=1e-9)


def test_a_model_that_computes_no_numbers_is_named(tiny_gguf, text, tmp_path):
    name = "blk.1.ffn_up.weight"
    with GGUFFile.open(tiny_gguf("llama", "drelu")) as file:
        up = np.full(file.tensors[name].shape, np.nan, np.float32)
    damaged = edit_gguf(tiny_gguf("llama", "drelu"), tmp_path / "damaged.gguf", tensors={name: up})
    with pytest.raises(UserError, match=r"damaged\.gguf.* not numbers"):
        train_predictors(damaged, text, tmp_path / "out.gguf", Wish(gates=True))
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q8_0, Type.F16])
def test_rounding_is_near_what_is_stored_and_passes_gradients(kind):
    matrix = torch.randn(5, 64, requires_grad=True)
    near = rounded(matrix, kind)
    limit = {Type.Q4_0: 0.15, Type.Q8_0: 0.01, Type.F16: 0.0}[kind]
    assert (near - matrix).norm() <= limit * matrix.norm()
    near.sum().backward()
    assert torch.equal(matrix.grad, torch.ones(5, 64))


def test_ranks_go_where_they_lower_the_cost_most():
    assert tried(7, 2) == [32, 96, 192] and tried(2, 2) == [32, 64] and tried(100, 5) == [320, 640, 1280]
    ranks, steep, flat = [32, 96, 192], [9.0, 3.0, 2.7], [5.0, 4.0, 3.9]
    assert share_out(ranks, [steep, flat], 2) == [32, 32]
    assert share_out(ranks, [steep, flat], 4) == [96, 32]
    assert share_out(ranks, [steep, flat], 7) == [128, 96]
    assert share_out(ranks, [steep, flat], 99) == [192, 192]


@pytest.mark.parametrize(("quant", "group"), [("q4_0", 1), ("q8_0", 1), ("q4_0", 2)])
def test_the_file_has_predictors_that_run_and_everything_else_as_it_was(tiny_gguf, text, tmp_path, quant, group):
    source, out = tiny_gguf("llama", "drelu", quant, group), tmp_path / "out.gguf"
    report = train_predictors(source, text, out, Wish(rank=32, recall=0.9, epochs=2))
    assert [path.name for path in tmp_path.iterdir() if path != text] == ["out.gguf"]
    with GGUFFile.open(source) as before, GGUFFile.open(out) as after:
        for key in before.metadata:
            assert after.record(key) == before.record(key)
        for name, tensor in before.tensors.items():
            copied = after.tensors[name]
            assert copied.type == tensor.type and copied.shape == tensor.shape
            assert np.array_equal(copied.data, tensor.data)
        predictor = ModelConfig.from_gguf(after).predictor
        assert predictor is not None and predictor.ranks == (32, 32) and predictor.input == "normed"
        assert after.tensors["blk.1.fc2.weight"].type.name.lower() == quant
    engine = Engine.load(out)
    words = next(read_documents(text))
    engine.count_activations()
    engine.session().logits(engine.tokenizer.encode(words)[:200], "predicted")
    counts = engine.counters()
    fired = counts.h.sum()
    assert counts.hit.sum() / fired == pytest.approx(report.mean("recall"), abs=0.1)
    assert counts.selected.sum() / fired == pytest.approx(report.mean("selected"), rel=0.2)
    with pytest.raises(UserError, match="--replace"):
        train_predictors(out, text, tmp_path / "again.gguf", Wish(rank=32))
    train_predictors(out, text, out, Wish(rank=64, epochs=1), replace=True)
    with GGUFFile.open(out) as file:
        assert ModelConfig.from_gguf(file).predictor.ranks == (64, 64)


def test_an_interrupted_run_goes_on_at_the_layer_and_ends_the_same(tiny_gguf, text, tmp_path, monkeypatch):
    source, wish = tiny_gguf("llama", "drelu", "q8_0"), Wish(share=0.7, epochs=1)
    whole, parts = tmp_path / "whole.gguf", tmp_path / "parts.gguf"
    train_predictors(source, text, whole, wish)
    seen, real = [], Collector.layer

    def interrupted(self, layer, progress):
        seen.append(layer)
        if seen == [0, 1]:
            raise KeyboardInterrupt
        return real(self, layer, progress)

    monkeypatch.setattr(Collector, "layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_predictors(source, text, parts, wish)
    assert not parts.exists()
    train_predictors(source, text, parts, wish)
    assert seen == [0, 1, 1]
    assert parts.read_bytes() == whole.read_bytes()


def test_tokens_in_the_memory_of_a_device_give_the_same_predictors(tiny_gguf, text, tmp_path, monkeypatch):
    source, wish = tiny_gguf("llama", "drelu", "q8_0"), Wish(share=0.7, epochs=1)
    far, near = tmp_path / "far.gguf", tmp_path / "near.gguf"
    train_predictors(source, text, far, wish)
    monkeypatch.setattr(Tokens, "near", lambda self, _: Tokens(torch.tensor(self.x), torch.tensor(self.mass)))
    train_predictors(source, text, near, wish)
    assert near.read_bytes() == far.read_bytes()


def test_thresholds_alone_are_set_anew(tiny_gguf, text, tmp_path):
    source, first, second = tiny_gguf("llama", "drelu", "q8_0"), tmp_path / "a.gguf", tmp_path / "b.gguf"
    few = train_predictors(source, text, first, Wish(rank=32, epochs=2, recall=0.7))
    with GGUFFile.open(first) as file:
        promised = ModelConfig.from_gguf(file).predictor.recall
    assert promised == pytest.approx([layer.mass_kept for layer in few.layers])  # each layer its own
    more = train_predictors(first, text, second, Wish(keep=True, recall=0.99))
    assert few.mean("mass_kept") == pytest.approx(0.7, abs=0.1) and more.mean("mass_kept") > 0.95
    with GGUFFile.open(first) as before, GGUFFile.open(second) as after:
        for name, tensor in before.tensors.items():
            same = after.tensors[name].data == tensor.data
            assert same.all() or (name.endswith("fc2.weight") and same.mean() > 0.9)
        old, new = (ModelConfig.from_gguf(file).predictor for file in (before, after))
        assert old.ranks == new.ranks and all(a > b for a, b in zip(old.thresholds, new.thresholds, strict=True))
    with pytest.raises(UserError, match="leave --keep out"):
        train_predictors(source, text, second, Wish(keep=True))


def test_a_folder_is_stored_as_q4_0_first_and_keeps_its_predictors_for_exports(tiny_folder, text, tmp_path):
    folder, out, exported = tmp_path / "model", tmp_path / "out.gguf", tmp_path / "exported.gguf"
    shutil.copytree(tiny_folder("qwen3", "reglu"), folder)
    train_predictors(folder, text, out, Wish(rank=32, epochs=1))
    subprocess.run([sys.executable, "-m", "turbosparse", "export", folder, exported], check=True, timeout=60)
    with GGUFFile.open(out) as first, GGUFFile.open(exported) as second:
        assert first.tensors["blk.0.ffn_gate.weight"].type == Type.Q4_0
        ours, theirs = ModelConfig.from_gguf(first).predictor, ModelConfig.from_gguf(second).predictor
        assert ours is not None and ours == theirs
        assert first.tensors.keys() == second.tensors.keys()
        for name in ("blk.0.fc1.weight", "blk.1.fc2.weight"):
            a, b = (file.tensors[name] for file in (first, second))
            a, b = (dequantize(tensor.data, tensor.type, tensor.shape) for tensor in (a, b))
            # Q4_0 of what was Q4_0: nearly all blocks get the scale again that they had.
            assert np.abs(a - b).mean() <= 0.01 * np.abs(a).mean()


def test_predictors_of_a_folder_that_are_not_its_own_are_named(tiny_folder, tiny_gguf, tmp_path):
    folder, path = tmp_path / "model", tmp_path / "m.gguf"
    shutil.copytree(tiny_folder("llama", "drelu"), folder)
    shutil.copy(tiny_gguf("llama", "drelu"), path)
    attach(folder, path)  # there are none
    before = path.read_bytes()
    fitting, narrow = (
        StoredPredictor.of(np.ones((32, hidden), np.float32), np.ones((96, 32), np.float32), (Type.F32, Type.F32))
        for hidden in (64, 32)
    )
    for layers in ([fitting], [narrow, narrow]):
        save_folder(folder, layers)
        with pytest.raises(UserError, match="another model"):
            attach(folder, path)
    kept = StoredPredictor.of(fitting.matrices()[0], fitting.matrices()[1], (Type.F32, Type.F32), 0.5, 0.75)
    save_folder(folder, [kept])
    assert [(layer.threshold, layer.kept) for layer in load_folder(folder, Type.F32)] == [(0.5, 0.75)]
    early = load_file(folder / FILE)
    early.pop("predictor.recall")  # which early folders do not have
    save_file(early, folder / FILE)
    assert [(layer.threshold, layer.kept) for layer in load_folder(folder, Type.F32)] == [(0.5, 0.0)]
    for recall in ([1.5], [-0.5], [float("nan")], [0.5, 0.5]):
        save_file(early | {"predictor.recall": np.array(recall, np.float32)}, folder / FILE)
        with pytest.raises(UserError, match="keep are none"):
            load_folder(folder, Type.F32)
    for content in (b"", b"no safetensors at all"):
        (folder / FILE).write_bytes(content)
        with pytest.raises(UserError, match=FILE):
            load_folder(folder, Type.Q8_0)
    assert path.read_bytes() == before


def test_a_device_that_is_not_there(tiny_gguf, text, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = tiny_gguf("llama", "drelu", "q8_0")
    with pytest.raises(UserError, match="--device cuda"):
        train_predictors(model, text, tmp_path / "x.gguf", Wish(rank=32, epochs=1, device="cuda"))
    train_predictors(model, text, tmp_path / "x.gguf", Wish(rank=32, epochs=1, device="auto"))


MISTAKES = {
    "dense": ({"rank": 32}, "is a dense swiglu model"),
    "rank": ({"rank": 33}, "--rank 33"),
    "share": ({"share": 0.01}, "--share 0.01"),
    "recall": ({"recall": 2}, "--recall 2"),
    "tokens": ({"tokens": 999}, "--tokens"),
    "out": ({}, "--out"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_sentence(case, tiny_gguf, text, tmp_path):
    wish, named = MISTAKES[case]
    model = tiny_gguf("llama", "dense" if case == "dense" else "drelu", "q8_0")
    out = tmp_path / "absent" / "x.gguf" if case == "out" else tmp_path / "x.gguf"
    with pytest.raises(UserError, match=named) as caught:
        train_predictors(model, text, out, Wish(**wish))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*.gguf"))


def test_the_command_prints_one_json_object(tiny_gguf, text, tmp_path):
    model, out = tiny_gguf("llama", "drelu", "q8_0"), tmp_path / "out.gguf"
    options = ["--data", text, "--rank", "32", "--epochs", "1", "--out", out, "--json"]
    command = [sys.executable, "-m", "turbosparse", "train-predictors", model, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    record = json.loads(done.stdout)
    assert len(record["layers"]) == 2 and record["mean"]["rank"] == 32 and record["output"] == str(out)


def test_windows_of_the_text_are_whole(tiny_gguf, text):
    with GGUFFile.open(tiny_gguf("llama", "drelu")) as file:
        pieces = train._windows(file, ModelConfig.from_gguf(file), text, 10_000)
    assert {len(piece) for piece in pieces} == {256} and len(pieces) >= 16
