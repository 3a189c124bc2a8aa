"""The engine in fp32 against transformers on the same dequantised weights: the yardstick of everything faster."""

import os
from pathlib import Path

import pytest
from agreement import logits_error

from turbosparse.engine import Engine, SamplingParams

pytestmark = pytest.mark.models
MODELS = Path(os.environ.get("TURBOSPARSE_TEST_MODELS", "."))
PROMPT = "Photosynthesis is the process by which plants turn light into chemical energy. In the first step,"


@pytest.mark.parametrize(
    "name", ["SmolLM2-135M-Instruct.Q4_1.gguf", "qwen2.5-coder-0.5b-instruct.gguf", "gemma-3-270m-q4_k_m.gguf"]
)
def test_fp32_equals_transformers(name):
    if not (MODELS / name).exists():
        pytest.skip(f"{name} is not in TURBOSPARSE_TEST_MODELS")
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    engine = Engine.load(MODELS / name, compute="f32")
    prompt = engine.tokenizer.encode(PROMPT)
    session = engine.session(context=256)
    tokens = list(prompt)
    session.prefill(prompt)
    for _ in range(64):
        tokens.append(session.sample(SamplingParams()))
        session.decode(tokens[-1])
    ours = engine.session(context=256).logits(tokens)
    model = AutoModelForCausalLM.from_pretrained(MODELS, gguf_file=name, dtype=torch.float32)
    with torch.no_grad():
        theirs = model(torch.tensor([tokens])).logits[0].numpy()
    error = logits_error(ours, theirs)
    assert error.max() <= 1e-3
    assert tokens[len(prompt) :] == theirs[len(prompt) - 1 : -1].argmax(-1).tolist()
