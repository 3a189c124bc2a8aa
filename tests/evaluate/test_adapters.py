"""A GGUF in the engine and its Hugging Face folder are the same model to the harness."""

import math
import re

import numpy as np
import pytest
from factories import make_folder
from lm_eval.api.instance import Instance

from turbosparse.engine import Engine
from turbosparse.errors import UserError
from turbosparse.evaluate import harness
from turbosparse.evaluate.data_folder import DataFolder
from turbosparse.evaluate.engine_lm import EngineLM
from turbosparse.evaluate.folder_lm import FolderLM
from turbosparse.evaluate.tasks import TASKS, Choice
from turbosparse.model.export import export_gguf

CONTEXT = 2048
SHARED = "The quick brown fox jumps over the lazy dog. " * 3
PAIRS = [
    (SHARED + "And then", " it sleeps."),
    (SHARED + "And then", " x"),
    (SHARED + "And then", " it sleeps."),
    (SHARED + "And now", " it runs, and runs"),
    ("", "no context at all"),
    ("a space at the end ", "and one word"),
    ("über façade\n", " 日本語"),
    ("<|im_start|>user", "<|im_end|>\n"),
    ("q", " a"),
]


def requests(kind, pairs):
    return [Instance(request_type=kind, doc={}, arguments=pair, idx=index) for index, pair in enumerate(pairs)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(family, activation, quant) -> (folder, file) of a tiny random model with a context of 2048."""
    kept = {}

    def make(family, activation, quant):
        if (family, activation) not in kept:
            folder = tmp_path_factory.mktemp("hf") / f"{family}-{activation}"
            kept[family, activation] = make_folder(folder, family, activation, max_position_embeddings=CONTEXT)
        file = kept[family, activation].with_suffix(f".{quant}.gguf")
        if not file.exists():
            export_gguf(kept[family, activation], file, quant)
        return kept[family, activation], file

    return make


MODELS = [("llama", "drelu", "f32"), ("llama", "dense", "f16"), ("gemma3", "reglu", "f32"), ("qwen2", "dense", "f32")]


@pytest.mark.parametrize(("family", "activation", "quant"), MODELS)
def test_likelihoods_of_a_file_are_those_of_its_folder(made, family, activation, quant):
    folder, file = made(family, activation, quant)
    long = ("word " * CONTEXT, " and the end")  # its beginning is cut off
    theirs = FolderLM(folder, batch=3).loglikelihood(requests("loglikelihood", [*PAIRS, long]))
    engine = Engine.load(file, compute="f32")
    for mode in engine.modes:
        ours = EngineLM(engine, mode).loglikelihood(requests("loglikelihood", [*PAIRS, long]))
        np.testing.assert_allclose([value for value, _ in ours], [value for value, _ in theirs], rtol=1e-3)
        assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_what_requests_share_changes_no_bit(made):
    _, file = made("gemma3", "reglu", "f32")
    engine = Engine.load(file)
    for mode in engine.modes:
        together = EngineLM(engine, mode).loglikelihood(requests("loglikelihood", PAIRS))
        alone = [EngineLM(engine, mode).loglikelihood(requests("loglikelihood", [pair]))[0] for pair in PAIRS]
        assert together == alone


def test_a_greedy_answer_is_seen_as_one(made):
    _, file = made("llama", "drelu", "f32")
    model = EngineLM(Engine.load(file), "exact")
    (text,) = model.generate_until(requests("generate_until", [(SHARED, {"max_gen_toks": 3})]))
    ids, whole = model.tok_encode(SHARED.rstrip()), model.tok_encode(SHARED.rstrip() + " x")
    assert whole[: len(ids)] == ids
    session = Engine.load(file).session()
    best = int(session.prefill(ids).argmax())
    values = model._loglikelihood_tokens([(None, ids, [best]), (None, ids, [best ^ 1])])
    assert values[0][1] and not values[1][1] and values[0][0] > values[1][0] and text
    assert values[0][0] == pytest.approx(math.log(_softmax(session, ids)[best]), rel=1e-5)


def _softmax(session, ids):
    session.reset()
    logits = session.prefill(ids).astype(np.float64)
    return np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()


def test_an_answer_longer_than_the_context_is_one_sentence(tiny_gguf):
    model = EngineLM(Engine.load(tiny_gguf("llama", "drelu", "q8_0")), "exact")
    with pytest.raises(UserError, match="does not fit the model's context of 256"):
        model.loglikelihood(requests("loglikelihood", [("x", " word" * 400)]))


@pytest.mark.parametrize(("family", "activation", "quant"), MODELS[:2])
def test_texts_in_windows_and_generated_texts_agree(made, family, activation, quant):
    folder, file = made(family, activation, quant)
    engine, theirs = Engine.load(file, compute="f32"), FolderLM(folder, batch=2)
    texts = [("once upon a time",), ("word and word " * 300,)]
    expected = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", texts))
    stop = theirs.generate_until(requests("generate_until", [(SHARED, {"max_gen_toks": 20})]))[0][5:8]
    questions = [
        (SHARED, {"max_gen_toks": 20}),
        (SHARED, {"max_gen_toks": 20, "until": [stop, "never that"]}),
        ("another", {"max_gen_toks": 7, "until": "never that", "do_sample": False, "temperature": 0.0}),
        ("long " * CONTEXT, {"max_gen_toks": 5}),
        ("no length", {}),
    ]
    answers = theirs.generate_until(requests("generate_until", questions))
    assert stop and answers[1] == answers[0].split(stop)[0]
    for mode in engine.modes:
        ours = EngineLM(engine, mode)
        values = ours.loglikelihood_rolling(requests("loglikelihood_rolling", texts))
        np.testing.assert_allclose(values, expected, rtol=1e-3)
        written = ours.generate_until(requests("generate_until", questions))
        # An id that the tiny tokenizer has no token for is nothing to transformers, and a placeholder in a GGUF file.
        assert [re.sub(r"\[PAD\d+\]", "", text) for text in written] == answers


def test_an_answer_that_fills_the_context_is_one_sentence(tiny_gguf, tiny_folder):
    models = EngineLM(Engine.load(tiny_gguf("llama", "drelu", "q8_0")), "exact"), FolderLM(tiny_folder("llama"))
    for model in models:
        assert isinstance(model.generate_until(requests("generate_until", [("x", {"max_gen_toks": 255})]))[0], str)
        with pytest.raises(UserError, match="writes up to 256 tokens"):
            model.generate_until(requests("generate_until", [("x", {})]))


def test_sampled_answers_are_refused(tiny_gguf):
    model = EngineLM(Engine.load(tiny_gguf("llama", "drelu", "q8_0")), "exact")
    with pytest.raises(ValueError, match="greedy"):
        model.generate_until(requests("generate_until", [("x", {"do_sample": True, "temperature": 1.0})]))


def test_every_task_has_the_same_items_right_in_file_and_folder(made, benchmarks):
    folder, file = made("llama", "drelu", "f32")
    engine = Engine.load(file, compute="f32")
    models = [FolderLM(folder), *(EngineLM(engine, mode) for mode in engine.modes)]
    data = DataFolder(benchmarks)
    for name, task in TASKS.items():
        if task.runs_code or name == "math":  # math: seven times math500
            continue
        scores = []
        for model in models:
            seen: list[tuple[int, int]] = []
            limit = 1 if task.shots else None  # the tasks that generate, which takes longest
            choice = Choice(name, min(task.shots, 1))
            scores.append(harness.run(model, choice, data, limit, lambda *state, seen=seen: seen.append(state)))
            assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] > 0
        for score in scores[1:]:
            assert score.items == pytest.approx(scores[0].items, rel=1e-3), name
            assert (score.task, score.fingerprint) == (scores[0].task, scores[0].fingerprint)
