"""The audit of predicted mode: its figures are those of a slow reference, it changes no bit, it answers drift."""

import math

import gguf
import numpy as np
import pytest
import torch
from factories import TinyPredictor, add_predictor, random_predictor
from published_folders import published_folder
from transformers import AutoModelForCausalLM

import turbosparse  # noqa: F401  registers the sparse model types
from turbosparse.engine import Engine, SamplingParams, draw_tokens
from turbosparse.engine.audit import Estimate, _student
from turbosparse.errors import UserError
from turbosparse.model.config import ModelConfig
from turbosparse.model.export import export_gguf
from turbosparse.model.gguf import GGUFFile
from turbosparse.model.shapes import shape_config
from turbosparse.model.synthetic import rates_for, write_synthetic
from turbosparse.model.synthetic_predictor import Prediction
from turbosparse.predict.decoder import Decoder, embed

Type = gguf.GGMLQuantizationType
TOKENS = [int(token) for token in np.random.default_rng(3).integers(3, 300, size=101)]


def equal_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))


def config_of(path) -> ModelConfig:
    with GGUFFile.open(path) as file:
        return ModelConfig.from_gguf(file)


@pytest.fixture(scope="module")
def predicting(tiny_gguf, tmp_path_factory):
    """predicting(family, quant, recall) -> (file, predictor): a tiny dReLU model whose first layer has no predictor."""

    def make(family="llama", quant="f32", recall=None, shift=0.0):
        source = tiny_gguf(family, "drelu", quant)
        c = config_of(source)
        if c.experts:
            rng = np.random.default_rng(7)
            fc1 = rng.standard_normal((c.experts, 32, c.hidden_size)) / c.hidden_size**0.5
            fc2 = rng.standard_normal((c.experts, c.ffn_size, 32)) / 32**0.5
            predictor = TinyPredictor([None, (fc1, fc2, shift + 0.1 * np.arange(c.experts))], True, recall)
        else:
            plain = random_predictor(c.n_layers, c.hidden_size, c.ffn_size, 32, True, without=0)
            layers = [layer and (layer[0], layer[1], layer[2] + shift) for layer in plain.layers]
            predictor = TinyPredictor(layers, True, recall)
        kind = {"q8_0": Type.Q8_0, "f32": Type.F32}[quant]
        return add_predictor(source, tmp_path_factory.mktemp("p") / "m.gguf", predictor, kind), predictor

    return make


class Watched:
    """The last layer of the reference: what fires of the last token, and what the predictor says of it."""

    def __init__(self, model, predictor) -> None:
        layer = model.model.layers[-1]
        self.fc1, self.fc2 = (torch.tensor(each, dtype=torch.float32) for each in predictor.layers[-1][:2])
        self.threshold, self.masked = predictor.layers[-1][2], False
        self.x = self.h = torch.empty(0)
        layer.post_attention_layernorm.register_forward_hook(self._see)
        layer.mlp.down_proj.register_forward_pre_hook(self._fire)

    def _see(self, _module, _inputs, output):
        self.x = output[0]

    def _fire(self, _module, inputs):
        self.h = inputs[0][0]
        keep = (torch.relu(self.x @ self.fc1.T) @ self.fc2.T >= self.threshold).float()
        self.selected = keep.bool()
        if self.masked:
            keep[: self.prompt] = 1  # a prompt is exact
            return (inputs[0] * keep,)
        return None


def test_the_figures_are_those_of_a_reference(predicting, tiny_folder):
    """One layer of two predicts, the last: the keys and values of both are those of exact mode."""
    path, predictor = predicting()
    model = AutoModelForCausalLM.from_pretrained(
        tiny_folder("llama", "drelu"), dtype=torch.float32, attn_implementation="eager"
    )
    watched = Watched(model, predictor)
    watched.prompt = 21
    with torch.no_grad():
        exact = model(torch.tensor([TOKENS])).logits[0].double().log_softmax(-1)
        h, selected = watched.h, watched.selected
        watched.masked = True
        predicted = model(torch.tensor([TOKENS])).logits[0].double().log_softmax(-1)
    engine = Engine.load(path, compute="f32", threads=2)
    session = engine.session()
    session.audit(1.0)
    session.prefill(TOKENS[:21], "predicted")
    for token in TOKENS[21:]:
        session.decode(token, "predicted")
    report = session.audit_report
    places = slice(21, None)
    fires, chosen, mass = (h[places] > 0), selected[places], h[places].double()
    recall = (fires & chosen).sum(-1) / fires.sum(-1)
    kept = (mass * chosen).sum(-1) / mass.sum(-1)
    kl = (exact.exp() * (exact - predicted)).sum(-1)[places]
    assert [verdict[0] for verdict in report.verdicts] == list(range(21, 101))
    ours = np.array([verdict[1:] for verdict in report.verdicts])
    np.testing.assert_allclose(ours[:, 0], recall, rtol=1e-6)
    np.testing.assert_allclose(ours[:, 1], kept, rtol=1e-4)
    np.testing.assert_allclose(ours[:, 2], kl, rtol=1e-3, atol=1e-7)
    assert report.layers[0].recall is None and report.layers[0].kept is None
    assert report.layers[1].recall == pytest.approx(float((fires & chosen).sum() / fires.sum()))
    assert report.layers[1].kept == pytest.approx(float((mass * chosen).sum() / mass.sum()), rel=1e-4)
    assert report.recall.mean == pytest.approx(ours[:, 0].mean()) and report.to_json()["tokens"] == 80


@pytest.mark.parametrize(("family", "cache"), [("llama", None), ("gemma3", "q8_0"), ("mixtral", "f16")])
@pytest.mark.parametrize("threads", [1, 3])
def test_an_audit_changes_no_bit_and_depends_on_the_seed_alone(predicting, family, cache, threads):
    engine = Engine.load(predicting(family, "q8_0")[0], threads=threads)
    plain = engine.session(128, cache)
    expected = [plain.decode(token, "predicted") for token in TOKENS]
    reports = []
    for share, seed in ((0.3, 1), (0.3, 1), (0.3, 2), (0.0, 1)):
        session = engine.session(128, cache)
        session.audit(share, seed)
        assert all(equal_bits(session.decode(t, "predicted"), row) for t, row in zip(TOKENS, expected, strict=True))
        # Keys and values are the predicted run's.
        assert equal_bits(session.decode(5, "exact"), plain.decode(5, "exact"))
        plain.truncate(len(TOKENS))
        reports.append(session.audit_report)
    first, again, other, none = reports
    assert first == again and first.verdicts != other.verdicts
    assert 15 < len(first.verdicts) < 46 and none.verdicts == () and none.recall == Estimate(None, None, None)
    # Beside others, and with other threads, it is the same.
    sessions = [engine.session(128, cache) for _ in range(3)]
    for session in sessions:
        session.audit(0.3, 1)
    for token in TOKENS:
        engine.decode_batch(sessions, [token] * 3, "predicted")
    assert all(session.audit_report == first for session in sessions)


def test_no_audit_costs_nothing_and_one_costs_an_exact_token(predicting):
    engine = Engine.load(predicting("llama", "q8_0")[0], threads=2)
    read = {}
    cases = {
        "none": (None, "predicted"),
        "zero": (0.0, "predicted"),
        "all": (1.0, "predicted"),
        "exact": (1.0, "exact"),
    }
    for name, (share, mode) in cases.items():
        session = engine.session()
        if share is not None:
            session.audit(share)
        engine.traffic(reset=True)
        for token in TOKENS[:4]:
            session.decode(token, mode)
        traffic = engine.traffic()
        read[name] = traffic.bytes
        assert traffic.tokens == 4
    assert read["none"] == read["zero"] < read["exact"]
    c = engine.config
    predictor = 4 * (32 * (c.hidden_size // 32 * 34) + c.ffn_size * 34)
    assert read["all"] - read["none"] == pytest.approx(read["exact"] + predictor, rel=0.02)


def test_counters_do_not_see_audits(predicting):
    engine = Engine.load(predicting("llama", "q8_0")[0], threads=2)
    engine.count_activations()
    session = engine.session()
    session.audit(1.0)
    for token in TOKENS[:4]:
        session.decode(token, "predicted")
    assert engine.counters().tokens == 4 and len(session.audit_report.verdicts) == 4


def drifting(predicting, shift: float, recall: float = 0.9, family: str = "llama"):
    """A session that decoded 200 tokens in predicted mode, every one audited, and its engine."""
    path, _ = predicting(family, "q8_0", recall, shift)
    engine = Engine.load(path, threads=2)
    session = engine.session()
    session.audit(1.0)
    session.prefill(TOKENS[:5], "predicted")
    tokens = list(draw_tokens(session, SamplingParams(temperature=1.5, seed=3), 200, "predicted"))
    return engine, session, tokens


@pytest.mark.parametrize(("shift", "sign"), [(1.0, -1), (-9.0, 1)])
def test_thresholds_that_drift_are_moved_to_what_the_file_promises(predicting, shift, sign):
    """Thresholds are far too high, or so low that everything is selected; 90 % of the mass is promised."""
    engine, session, tokens = drifting(predicting, shift)
    report = session.audit_report
    assert report.promised == pytest.approx((0.9, 0.9))  # an early file: one promise for all layers
    first = report.moves[0]
    assert first.layer == 1 and first.by * sign > 0 and first.position == 5 + 15
    assert (first.kept < 0.8) if sign < 0 else (first.kept == 1.0)
    late = [verdict[2] for verdict in report.verdicts if verdict[0] > report.moves[-1].position]
    assert len(late) > 20 and np.mean(late) == pytest.approx(0.9, abs=0.05)
    # A new text begins with the file's thresholds, and the same text has the same moves.
    again = engine.session()
    again.audit(1.0)
    again.prefill(TOKENS[:5], "predicted")
    assert list(draw_tokens(again, SamplingParams(temperature=1.5, seed=3), 200, "predicted")) == tokens
    assert again.audit_report == report
    # Beside a sequence with the file's thresholds each has its own.
    fresh, alone = engine.session(), engine.session()
    together = engine.decode_batch([again, fresh], [7, 7], "predicted")
    assert equal_bits(together[1], alone.decode(7, "predicted"))
    assert equal_bits(together[0], session.decode(7, "predicted"))
    session.reset()
    fresh = engine.session()
    assert equal_bits(session.decode(7, "predicted"), fresh.decode(7, "predicted"))


def test_what_holds_is_left_alone_and_so_is_what_promises_nothing(predicting):
    _, session, _ = drifting(predicting, 1.0, None)
    assert session.audit_report.moves == () and session.audit_report.promised is None
    kept = session.audit_report.kept.mean
    _, session, _ = drifting(predicting, 1.0, round(kept, 3))
    assert session.audit_report.moves == ()


def test_every_layer_is_held_to_its_own_promise(tiny_gguf, tmp_path):
    """Two layers keep what they keep; whichever promises something else is moved, to that."""
    source = tiny_gguf("llama", "drelu", "q8_0")
    c = config_of(source)
    plain = random_predictor(c.n_layers, c.hidden_size, c.ffn_size, 32, True)

    def report_of(promised: list[float]):
        path = add_predictor(source, tmp_path / "m.gguf", TinyPredictor(plain.layers, True, promised), Type.Q8_0)
        session = Engine.load(path, threads=2).session()
        session.audit(1.0)
        session.prefill(TOKENS[:5], "predicted")
        for token in TOKENS[5:] + TOKENS:
            session.decode(token, "predicted")
        return session.audit_report

    kept = [layer.kept for layer in report_of([0.0, 0.0001]).layers]
    assert max(kept) < 0.9
    for wrong in range(2):
        promised = [round(share, 4) for share in kept]
        promised[wrong] = 0.95
        report = report_of(promised)
        assert report.promised == pytest.approx(promised) and {move.layer for move in report.moves} == {wrong}
        assert report.moves[0].by < 0
    silent = report_of([0.0, 0.95])
    assert {move.layer for move in silent.moves} == {1} and silent.to_json()["promised"] == pytest.approx([0.0, 0.95])


def test_behind_a_gate_threshold_only_what_passes_it_is_audited(tmp_path):
    """FATReLU (ProSparse): gates above zero and below the threshold neither fire nor count as missed."""
    folder = published_folder(tmp_path / "hf", "prosparse", hidden_act_param=0.3)
    export_gguf(folder, tmp_path / "plain.gguf", "f32")
    c = config_of(tmp_path / "plain.gguf")
    assert c.gate_threshold == pytest.approx(0.3)
    predictor = random_predictor(c.n_layers, c.hidden_size, c.ffn_size, 32, True, without=0)
    path = add_predictor(tmp_path / "plain.gguf", tmp_path / "m.gguf", predictor, Type.F32)
    engine = Engine.load(path, compute="f32", threads=2)
    session = engine.session()
    session.audit(1.0)
    for token in TOKENS:
        session.decode(token, "predicted")
    report = session.audit_report
    with GGUFFile.open(path) as file, torch.inference_mode():
        stream = embed(file, c, TOKENS)[None]
        for layer in range(c.n_layers):
            stream, fired = Decoder(file, c, layer, torch.device("cpu"))(stream)
    fc1, fc2, threshold = predictor.layers[-1]
    matrices = (torch.tensor(each, dtype=torch.float32) for each in (fc1, fc2))
    first, second = matrices
    chosen = torch.relu(fired.x[0] @ first.T) @ second.T >= threshold
    mass = fired.h[0].abs().double()
    opened = fired.x[0] @ torch.from_numpy(gate_of(path, c)).T
    silenced = ((opened > 0) & (opened < 0.3)).sum()
    assert silenced > 100 and int((mass > 0).sum()) + int(silenced) == int((opened > 0).sum())
    fired_in_all, found, of_mass, of_kept = report.sums[-1]
    assert fired_in_all == pytest.approx(int((mass > 0).sum()), abs=3)  # a gate within rounding of the threshold
    assert found == pytest.approx(int(((mass > 0) & chosen).sum()), abs=3)
    assert of_mass == pytest.approx(float(mass.sum()), rel=1e-3)
    assert of_kept == pytest.approx(float((mass * chosen).sum()), rel=1e-3)


def gate_of(path, config) -> np.ndarray:
    """The last layer's gate, float32 [ffn, hidden]."""
    with GGUFFile.open(path) as file:
        tensor = file.tensors[f"blk.{config.n_layers - 1}.ffn_gate.weight"]
        return np.frombuffer(tensor.data, np.float32).reshape(tensor.shape).copy()


def test_experts_of_a_layer_are_moved_together(predicting):
    _, session, _ = drifting(predicting, 1.0, 0.9, "mixtral")
    report = session.audit_report
    assert report.moves[0].layer == 1 and report.moves[0].by < 0 and report.moves[0].kept < 0.8
    late = [verdict[2] for verdict in report.verdicts if verdict[0] > report.moves[-1].position]
    assert len(late) > 20 and np.mean(late) == pytest.approx(0.9, abs=0.05)


def test_only_layers_that_are_predicted_are_audited(tmp_path):
    config = shape_config("smollm2-135m", "drelu", 2)
    write_synthetic(tmp_path / "m.gguf", "m", config, rates_for(0.9, 0.25), "q4_0", prediction=Prediction())
    engine = Engine.load(tmp_path / "m.gguf", threads=2)
    session, plain = engine.session(), engine.session()
    session.audit(1.0)
    for token in TOKENS[:40]:
        assert equal_bits(session.decode(token, "auto-predicted"), plain.decode(token, "auto-predicted"))
    report = session.audit_report
    assert [verdict[0] for verdict in report.verdicts] == list(range(16, 40))  # before, it counts
    assert "predicted" in session.choices and report.recall.mean > 0.9
    for mode in ("exact", "dense", "auto"):
        session.decode(5, mode)
    assert session.audit_report == report


def test_intervals_are_students():
    scipy = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 3, 4, 5, 10, 100):
        assert _student(freedom) == pytest.approx(scipy.t.ppf(0.975, freedom), rel=3e-3)
    estimate = Estimate.of([0.9, 1.0, 0.8, 0.95])
    assert estimate.mean == pytest.approx(0.9125)
    assert estimate.high - estimate.mean == pytest.approx(3.182 * np.std([0.9, 1.0, 0.8, 0.95], ddof=1) / 2)
    assert Estimate.of([0.5]) == Estimate(0.5, None, None)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_figures_of_damaged_weights_are_no_numbers(value):
    for values in ([value], [0.5, value, 1.0], [value, -value]):
        assert all(map(math.isnan, vars(Estimate.of(values)).values()))


def test_a_share_that_is_none(predicting):
    session = Engine.load(predicting()[0]).session()
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(UserError, match="--audit"):
            session.audit(share)
