import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from turbosparse.errors import UserError
from turbosparse.evaluate import perplexity
from turbosparse.evaluate.perplexity import (
    kl_divergence,
    negative_log_likelihoods,
    perplexity_engine,
    perplexity_hf,
)
from turbosparse.evaluate.windows import windows

VOCABULARY = 7


class FakeEngine:
    """Logits that depend on the whole prefix, so that a window must start afresh and go in order."""

    def __init__(self, vocabulary=VOCABULARY, scale=1.0):
        self.config = SimpleNamespace(vocab_size=vocabulary)
        self.scale, self.sessions, self.largest_call = scale, 0, 0

    def session(self, context):
        self.sessions += 1
        return FakeSession(self, context)

    def after(self, prefix, mode):
        generator = np.random.default_rng([mode == "exact", *prefix])
        return (self.scale * generator.normal(size=self.config.vocab_size)).astype(np.float32)


class FakeSession:
    def __init__(self, engine, context):
        self.engine, self.context, self.prefix = engine, context, []

    def reset(self):
        self.prefix = []

    def logits(self, tokens, mode):
        assert len(self.prefix) + len(tokens) <= self.context
        self.engine.largest_call = max(self.engine.largest_call, len(tokens))
        rows = []
        for token in tokens:
            self.prefix.append(token)
            rows.append(self.engine.after(self.prefix, mode))
        return np.array(rows)


def _slow(engine, token_windows, mode):
    nats = []
    for window in token_windows:
        for i in range(1, len(window)):
            logits = [float(x) for x in engine.after(window[:i], mode)]
            nats.append(math.log(sum(math.exp(x) for x in logits)) - logits[window[i]])
    return len(nats), sum(nats) / len(nats)


WINDOWS = [[1, 2, 3, 4, 5], [6, 0, 1, 2, 3], [2, 4]]


@pytest.mark.parametrize("asked", [1, VOCABULARY, 3 * VOCABULARY, 1 << 26])
def test_perplexity_is_the_mean_over_tokens_whatever_the_parts(monkeypatch, asked):
    monkeypatch.setattr(perplexity, "_LOGITS_ASKED", asked)
    engine = FakeEngine()
    shown = []
    result = perplexity_engine(engine, WINDOWS, "exact", lambda *state: shown.append(state))
    tokens, nats = _slow(engine, WINDOWS, "exact")
    assert (result.mode, result.tokens) == ("exact", tokens) == ("exact", 9)
    assert result.nats_per_token == pytest.approx(nats, abs=2e-6)
    assert result.perplexity == pytest.approx(math.exp(nats), rel=2e-6)
    assert engine.largest_call == max(1, min(4, asked // VOCABULARY))
    assert [count for count, _ in shown] == [4, 8, 9]
    assert shown[-1][1] == result.nats_per_token
    assert set(result.to_json()) == {"mode", "tokens", "nats_per_token", "perplexity"}


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**32 - 1), st.floats(0, 1e4), st.floats(-1e6, 1e6))
def test_log_likelihoods_are_stable(rows, vocabulary, seed, scale, shift):
    generator = np.random.default_rng(seed)
    logits = (scale * generator.normal(size=(rows, vocabulary)) + shift).astype(np.float32)
    targets = generator.integers(vocabulary, size=rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perplexity, "_LOGITS_IN_FLOAT64", 2 * vocabulary)
        found = negative_log_likelihoods(logits, targets)
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits).double(), torch.from_numpy(targets), reduction="none"
    )
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6, atol=1e-6)


def test_a_token_of_probability_zero_gives_infinity():
    logits = np.array([[0.0, -np.inf]], np.float32)
    assert negative_log_likelihoods(logits, [1]).tolist() == [math.inf]


def test_logits_that_are_not_numbers_are_one_sentence():
    with pytest.raises(UserError, match="not numbers"):
        perplexity_engine(FakeEngine(scale=math.nan), WINDOWS, "dense")
    with pytest.raises(UserError, match="no token to predict"):
        perplexity_engine(FakeEngine(), [], "dense")


def test_kl_divergence_equals_torch(monkeypatch):
    monkeypatch.setattr(perplexity, "_LOGITS_ASKED", 2 * VOCABULARY)
    a, b = FakeEngine(), FakeEngine(scale=2.0)
    terms = []
    for window in WINDOWS:
        for i in range(1, len(window) + 1):
            p, q = (torch.from_numpy(e.after(window[:i], "dense")).double().log_softmax(-1) for e in (a, b))
            terms.append(float((p.exp() * (p - q)).sum()))
    assert kl_divergence(a, b, WINDOWS) == pytest.approx(np.mean(terms), rel=1e-10)
    assert kl_divergence(a, a, WINDOWS) == 0.0
    assert kl_divergence(a, a, WINDOWS, "dense", "exact") > 0.01
    with pytest.raises(UserError, match="one vocabulary"):
        kl_divergence(a, FakeEngine(vocabulary=8), WINDOWS)


def test_a_zero_probability_adds_nothing_to_kl(monkeypatch):
    a, b = FakeEngine(), FakeEngine()
    a.after = lambda prefix, mode: np.array([0.0, -np.inf], np.float32)
    b.after = lambda prefix, mode: np.array([0.0, 0.0], np.float32)
    assert kl_divergence(a, b, [[0, 0]]) == pytest.approx(math.log(2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random Llama with a word tokenizer."""
    path = tmp_path_factory.mktemp("tiny")
    words = {"<eos>": 0, "<unk>": 1} | {f"w{i}": i + 2 for i in range(20)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", unk_token="<unk>").save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=22, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, head_dim=8
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def test_perplexity_of_a_hugging_face_folder_is_its_loss(folder, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["w1 w2 w3 w4", "w5 w6 w7 w8"]))
    result = perplexity_hf(folder, path, length=5)
    model = LlamaForCausalLM.from_pretrained(folder)
    first = torch.tensor([[3, 4, 5, 6, 0]])
    second = torch.tensor([[7, 8, 9, 10]])
    with torch.no_grad():
        expected = (4 * model(first, labels=first).loss + 3 * model(second, labels=second).loss) / 7
    assert (result.mode, result.tokens) == ("hf", 7)
    assert result.nats_per_token == pytest.approx(float(expected), rel=1e-5)


def test_a_folder_that_is_no_model_is_one_sentence(tmp_path):
    (tmp_path / "a.txt").write_text("w1 w2")
    with pytest.raises(UserError, match=r"has no config\.json"):
        perplexity_hf(tmp_path, tmp_path / "a.txt")


# --- the real models -------------------------------------------------------------------------------------------------

# Measured with transformers in fp32 on the dequantised weights, on the first 50 KB of WikiText-2 test: windows of 1024
# without BOS (with it Gemma has 16.13).
REAL = {"SmolLM2-135M-Instruct.Q4_1": 22.310, "qwen2.5-coder-0.5b-instruct": 28.800, "gemma-3-270m-q4_k_m": 29.616}


@pytest.mark.models
@pytest.mark.parametrize("name", REAL)
def test_perplexity_of_the_real_models(name, tmp_path):
    engine_module = pytest.importorskip("turbosparse.engine")
    folder, text = os.environ.get("TURBOSPARSE_TEST_MODELS"), os.environ.get("TURBOSPARSE_TEST_WIKITEXT")
    if not folder or not text:
        pytest.skip("TURBOSPARSE_TEST_MODELS and TURBOSPARSE_TEST_WIKITEXT do not name the models and the text")
    path = Path(folder) / f"{name}.gguf"
    if not path.is_file():
        pytest.skip(f"{path.name} is not in TURBOSPARSE_TEST_MODELS")
    sample = tmp_path / "wikitext.txt"
    sample.write_bytes(Path(text).read_bytes()[:50_000].decode("utf-8", "ignore").encode())
    engine = engine_module.Engine.load(path, compute="f32")
    result = perplexity_engine(engine, windows(engine.tokenizer, sample), "dense")
    assert result.perplexity == pytest.approx(REAL[name], rel=0.005)
