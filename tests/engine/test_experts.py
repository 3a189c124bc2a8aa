"""Mixtures of experts: right against transformers, and bitwise the same however they are run."""

from functools import partial

import numpy as np
import pytest
import torch
from agreement import TOKENS, check_same_bits, equal_bits, logits_error
from factories import MIXTURES, TinyPredictor, add_predictor, make_folder
from gguf import GGMLQuantizationType as Type
from transformers import AutoModelForCausalLM

from turbosparse import _native
from turbosparse.engine import Engine
from turbosparse.model.config import ModelConfig
from turbosparse.model.export import export_gguf
from turbosparse.model.gguf import GGUFFile


def reference(dense_folder, activation: str, predictor=None, thresholds=(0.0, 0.0)):
    """transformers' model, with the activation in its experts and what a predictor does not select left out."""
    model = AutoModelForCausalLM.from_pretrained(
        dense_folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    for index, layer in enumerate(model.model.layers):
        experts = layer.mlp.experts
        seen = {}  # the stream before the norm
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _, x, seen=seen: seen.update(x=x[0][0]))
        matrices = predictor and predictor.layers[index]
        if activation == "reglu":
            experts.act_fn = torch.nn.ReLU()
        if activation == "drelu":
            selects = partial(selected, *matrices, seen, predictor.normed) if matrices else None
            experts.forward = partial(drelu_experts, experts, selects, thresholds[index])
    return model


def drelu_experts(
    experts, selects, threshold: float, x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """x [tokens, hidden], index and weight [tokens, chosen]: token by token, in the order of the router."""
    out = torch.zeros_like(x)
    for t in range(len(x)):
        for e, w in zip(index[t], weight[t], strict=True):
            gate, up = (experts.gate_up_proj[e] @ x[t]).chunk(2)
            h = torch.relu(gate) * torch.relu(up)
            h = h * (h >= threshold)
            out[t] += w * (experts.down_proj[e] @ (h if selects is None else h * selects(x, t, e)))
    return out


def selected(fc1, fc2, thresholds, seen, normed: bool, x: torch.Tensor, t: int, e: int) -> torch.Tensor:
    """Whether the predictor of expert e selects its neurons for token t, bool [ffn]."""
    fc1, fc2 = (torch.tensor(matrix[e], dtype=torch.float32) for matrix in (fc1, fc2))
    return fc2 @ torch.relu(fc1 @ (x if normed else seen["x"])[t]) >= thresholds[e]


@pytest.mark.parametrize("activation", ["dense", "drelu", "reglu"])
@pytest.mark.parametrize("family", MIXTURES)
def test_fp32_logits_are_those_of_transformers(tiny_folder, tiny_gguf, family, activation):
    engine = Engine.load(tiny_gguf(family, activation), compute="f32", threads=2)
    model = reference(tiny_folder(family), activation)  # the same weights
    with torch.no_grad():
        theirs = model(torch.tensor([TOKENS])).logits[0].numpy()
    for mode in engine.modes:
        ours = engine.session().logits(TOKENS, mode)
        assert logits_error(ours, theirs).max() < 1e-4, mode


def test_a_threshold_holds_in_every_expert_of_a_layer(tiny_folder, tmp_path):
    thresholds = [0.02, 0.3]
    folder = make_folder(tmp_path / "hf", "mixtral", "drelu", activation_threshold=thresholds)
    export_gguf(folder, tmp_path / "m.gguf", "f32")
    engine = Engine.load(tmp_path / "m.gguf", compute="f32", threads=2)
    with torch.no_grad():
        theirs = reference(tiny_folder("mixtral"), "drelu", None, thresholds)(torch.tensor([TOKENS])).logits[0].numpy()
    dense = engine.session().logits(TOKENS, "dense")
    assert logits_error(dense, theirs).max() < 1e-4
    assert equal_bits(engine.session().logits(TOKENS, "exact"), dense)


@pytest.mark.parametrize("quant", ["q4_0", "q8_0", "f32"])
@pytest.mark.parametrize("isa", _native.isas())
def test_modes_threads_and_prompts_in_blocks_give_the_same_bits(tiny_gguf, isa, quant):
    check_same_bits(tiny_gguf("mixtral", "drelu", quant), isa, (1, 2, 3))


@pytest.mark.parametrize("activation", ["dense", "drelu"])
@pytest.mark.parametrize("family", MIXTURES)
def test_together_as_alone(tiny_gguf, family, activation):
    engine = Engine.load(tiny_gguf(family, activation, "q8_0"), threads=2)
    for mode in engine.modes:
        alone = [engine.session().logits([*TOKENS[: 5 + i], 7 + i], mode)[-1] for i in range(9)]
        sessions = [engine.session() for _ in alone]
        for i, session in enumerate(sessions):
            session.prefill(TOKENS[: 5 + i], mode)
        together = engine.decode_batch(sessions, [7 + i for i in range(9)], mode)
        assert equal_bits(together, np.stack(alone)), mode


def test_a_token_reads_the_experts_that_it_chose(tiny_gguf):
    engine = Engine.load(tiny_gguf("mixtral", "drelu", "q8_0"), threads=3)
    c = engine.config
    row, neurons = c.hidden_size // 32 * 34, 4 * c.n_layers * c.experts_used * c.ffn_size
    router = c.experts * c.hidden_size * 4
    q_size, kv_size = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    attention = (q_size + 2 * kv_size) * row + c.hidden_size * (q_size // 32 * 34)
    fixed = c.n_layers * (attention + router) + (c.vocab_size + 1) * row
    for mode in ("dense", "exact"):
        session = engine.session()
        engine.traffic(reset=True)
        for token in TOKENS[:4]:
            session.decode(token, mode)
        traffic = engine.traffic()
        rows = 3 * neurons if mode == "dense" else neurons * (1 + traffic.open + traffic.active)
        assert traffic.bytes == 4 * fixed + round(rows) * row
        assert 0 < traffic.active < traffic.open < 1


@pytest.fixture(scope="module")
def predicting(tiny_gguf, tmp_path_factory):
    """predicting(quant, normed) -> (file, predictor): a tiny dReLU Mixtral whose first layer has no predictor."""

    def make(quant="f32", normed=True, rank=32):
        source = tiny_gguf("mixtral", "drelu", quant)
        with GGUFFile.open(source) as file:
            c = ModelConfig.from_gguf(file)
        rng = np.random.default_rng(rank)
        fc1 = rng.standard_normal((c.experts, rank, c.hidden_size)) / c.hidden_size**0.5
        fc2 = rng.standard_normal((c.experts, c.ffn_size, rank)) / rank**0.5
        predictor = TinyPredictor([None, (fc1, fc2, 0.1 * np.arange(c.experts))], normed)
        kind = {"q4_0": Type.Q4_0, "q8_0": Type.Q8_0, "f32": Type.F32}[quant]
        return add_predictor(source, tmp_path_factory.mktemp("p") / "m.gguf", predictor, kind), predictor

    return make


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("rank", [32, 7])
def test_every_expert_has_a_predictor_of_its_own(tiny_folder, predicting, normed, rank):
    path, predictor = predicting("f32", normed, rank)
    engine = Engine.load(path, compute="f32", threads=2)
    model = reference(tiny_folder("mixtral"), "drelu", predictor)
    with torch.no_grad():
        theirs = model(torch.tensor([TOKENS])).logits[0].numpy()
    ours = engine.session().logits(TOKENS, "predicted")
    assert logits_error(ours, theirs).max() < 1e-4
    assert not np.allclose(ours, engine.session().logits(TOKENS, "exact"), rtol=0.1)  # they leave something out


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("quant", ["q4_0", "q8_0"])
def test_predicted_experts_have_the_same_bits_however_they_run(predicting, quant, normed):
    path, _ = predicting(quant, normed)
    expected = Engine.load(path, threads=1).session().logits(TOKENS, "predicted")
    for threads in (2, 3):
        engine = Engine.load(path, threads=threads)
        session = engine.session()
        assert equal_bits(np.stack([session.decode(token, "predicted") for token in TOKENS]), expected)
        sessions = [engine.session() for _ in range(5)]
        for behind, session in enumerate(sessions):
            session.logits(TOKENS[: 9 + behind], "predicted")
        assert equal_bits(engine.decode_batch(sessions, TOKENS[9:14], "predicted"), expected[9:14])


def test_the_automatic_mode_counts_the_neurons_of_all_chosen_experts(tiny_gguf):
    """Half of the gates are open, which is for exact. Counted over the neurons of one expert, all would be."""
    engine = Engine.load(tiny_gguf("mixtral", "reglu", "q8_0"))
    session = engine.session()
    for token in TOKENS[:20]:
        session.decode(token, "auto")
    assert 0.4 < engine.traffic().open < 0.6
    assert session.choices == ("exact", "exact")


def test_counters_tell_experts_apart_and_change_no_bit(tiny_gguf):
    engine = Engine.load(tiny_gguf("mixtral", "drelu", "q4_0"), threads=2)
    c = engine.config
    plain = engine.session().logits(TOKENS, "exact")
    engine.count_activations()
    assert equal_bits(engine.session().logits(TOKENS, "exact"), plain)
    prompt = engine.counters(reset=True)
    session = engine.session()
    for token in TOKENS:
        session.decode(token, "exact")
    single = engine.counters()
    assert prompt.h.shape == (c.n_layers, c.experts, c.ffn_size) and prompt.selected is None
    assert (prompt.routed.sum(axis=1) == c.experts_used * len(TOKENS)).all()
    assert (prompt.h <= prompt.gate).all() and (prompt.gate.max(axis=-1) <= prompt.routed).all()
    for name in ("routed", "gate", "up", "h"):
        assert np.array_equal(getattr(prompt, name), getattr(single, name)) and getattr(prompt, name).any()


def with_routers(source, out, value: float):
    """A copy of a file whose routers hold one value only."""
    data = source.read_bytes()
    with GGUFFile.open(source) as file:
        for name, tensor in file.tensors.items():
            if name.endswith("ffn_gate_inp.weight"):
                data = data.replace(tensor.data.tobytes(), np.full(tensor.size, value, np.float32).tobytes())
    out.write_bytes(data)
    return out


def test_equal_experts_are_chosen_by_index(tiny_gguf, tmp_path):
    engine = Engine.load(with_routers(tiny_gguf("mixtral", "drelu"), tmp_path / "m.gguf", 0.0))
    engine.count_activations()
    engine.session().logits(TOKENS, "exact")
    assert engine.counters().routed.tolist() == [[len(TOKENS)] * 2 + [0] * 3] * 2


def test_routers_that_are_no_numbers_show_in_the_logits(tiny_gguf, tmp_path):
    engine = Engine.load(with_routers(tiny_gguf("mixtral", "drelu"), tmp_path / "m.gguf", float("nan")))
    for mode in engine.modes:
        assert np.isnan(engine.session().logits(TOKENS[:3], mode)).all()
