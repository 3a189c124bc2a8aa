"""The model that ships with the repository: what `make demo` shows, held to transformers and to itself."""

from pathlib import Path

import numpy as np
import pytest
import torch
from agreement import logits_error
from factories import TinyPredictor, add_predictor, random_predictor
from gguf import GGMLQuantizationType

from turbosparse.engine import LOSSLESS, Engine, SamplingParams, draw_tokens
from turbosparse.evaluate.windows import engine_windows
from turbosparse.model.config import ModelConfig
from turbosparse.model.gguf import GGUFFile
from turbosparse.model.quantize import dequantize
from turbosparse.relufy.drelu import TurboSparseLlamaConfig, TurboSparseLlamaForCausalLM

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "TurboSparse-SmolLM2-135M-Q4_0.gguf"
pytestmark = pytest.mark.skipif(not MODEL.exists(), reason="the repository was cloned without models/")

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):",
    "Question: A farmer has 12 cows and buys 7 more. How many cows does he have?\nAnswer:",
    "Photosynthesis is",
    "import numpy as np\n",
    "Theorem. Let $G$ be a finite group.",
    "Once upon a time",
    "The history of the printing press",
    "class Stack:\n    def __init__(self):",
    "Water boils at",
    "In 1969,",
    "The derivative of x^2 is",
    "#include <stdio.h>\n",
    "A list of fruits: apples,",
    "Dear Sir or Madam,",
    "The largest planet",
    "SELECT name FROM",
    "To be or not to be",
    "Proof. We proceed by induction on",
    "What is 17 + 25?",
]


def greedy(engine: Engine, prompt: str, count: int, mode: str) -> list[int]:
    session = engine.session(512)
    session.prefill(engine.tokenizer.encode(prompt), mode)
    tokens = []
    for _ in range(count):
        tokens.append(session.sample(SamplingParams()))
        session.decode(tokens[-1], mode)
    return tokens


@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(0.8, seed=2), SamplingParams(repetition_penalty=1.1)]
)
def test_draws_are_those_of_all_logits(params):
    engine = Engine.load(MODEL, threads=2)
    prompt, count = engine.tokenizer.encode(PROMPTS[0]), 72
    drawing, decoding = engine.session(128), engine.session(128)
    drawing.prefill(prompt, "exact")
    decoding.prefill(prompt, "exact")
    expected = [decoding.sample(params)]
    for _ in range(count - 1):
        decoding.decode(expected[-1], "exact")
        expected.append(decoding.sample(params))
    read = engine.traffic(reset=True).bytes
    assert list(draw_tokens(drawing, params, count, "exact")) == expected
    assert engine.traffic().bytes < 0.92 * read


def check_modes(prompts: list[str], count: int) -> None:
    engines = [Engine.load(MODEL, threads=threads) for threads in (1, 2)]
    for prompt in prompts:
        texts = [greedy(engine, prompt, count, mode) for engine in engines for mode in ("dense", "exact")]
        assert all(text == texts[0] for text in texts), prompt


def test_modes_and_threads_write_the_same_text():
    check_modes(PROMPTS[:3], 48)


@pytest.mark.models  # a minute or two: the same at full length
def test_modes_and_threads_write_the_same_256_tokens_on_20_prompts():
    check_modes(PROMPTS, 256)


def lossless_texts(path: Path, prompts: list[list[int]], count: int, params: SamplingParams) -> int:
    """How many tokens came of verifications beside the first of each; every text must be that of exact mode."""
    engine = Engine.load(path)
    drafted = 0
    for prompt in prompts:
        exact, ours = engine.session(256), engine.session(256)
        exact.prefill(prompt, "exact")
        ours.prefill(prompt, LOSSLESS)
        assert list(draw_tokens(ours, params, count, LOSSLESS)) == list(draw_tokens(exact, params, count, "exact"))
        drafted += ours.drafting.looked_up_right + ours.drafting.predicted_right
    return drafted


def sample_prompts(count: int) -> list[list[int]]:
    """32 tokens each, from all over the sample text."""
    engine = Engine.load(MODEL)
    tokens = [token for piece in engine_windows(engine, ROOT / "examples" / "sample.jsonl") for token in piece]
    step = (len(tokens) - 32) // count
    return [tokens[index * step : index * step + 32] for index in range(count)]


def with_predictors(out: Path) -> Path:
    """The model with predictors that know nothing, so that many drafts are wrong."""
    with GGUFFile.open(MODEL) as file:
        config = ModelConfig.from_gguf(file)
    predictor = random_predictor(config.n_layers, config.hidden_size, config.ffn_size, 32, True)
    layers = [layer if index % 6 == 0 else None for index, layer in enumerate(predictor.layers)]
    return add_predictor(MODEL, out, TinyPredictor(layers, True), GGMLQuantizationType.Q4_0)


def test_lossless_writes_what_exact_writes():
    assert lossless_texts(MODEL, sample_prompts(3), 48, SamplingParams()) > 0


@pytest.mark.models  # some minutes
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("predictors", [False, True])
def test_lossless_writes_the_same_128_tokens_on_100_prompts(temperature, predictors, tmp_path):
    path = with_predictors(tmp_path / "m.gguf") if predictors else MODEL
    assert lossless_texts(path, sample_prompts(100), 128, SamplingParams(temperature, seed=9)) > 0


def _reference() -> TurboSparseLlamaForCausalLM:
    """transformers with the weights of the file, dequantised; Q and K in the order of Hugging Face."""
    engine_config = Engine.load(MODEL).config
    config = TurboSparseLlamaConfig(
        activation="drelu",
        activation_threshold=list(engine_config.activation_thresholds or ()) or None,
        hidden_size=engine_config.hidden_size,
        intermediate_size=engine_config.ffn_size,
        num_hidden_layers=engine_config.n_layers,
        num_attention_heads=engine_config.n_heads,
        num_key_value_heads=engine_config.n_kv_heads,
        head_dim=engine_config.head_dim,
        vocab_size=engine_config.vocab_size,
        max_position_embeddings=engine_config.context_length,
        rms_norm_eps=engine_config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": engine_config.rope_theta},
        tie_word_embeddings=True,
    )
    model = TurboSparseLlamaForCausalLM(config)
    state = {}
    with GGUFFile.open(MODEL) as file:
        weights = {name: dequantize(tensor.data, tensor.type, tensor.shape) for name, tensor in file.tensors.items()}
    for name, hf_name in (("token_embd", "embed_tokens"), ("output_norm", "norm")):
        state[f"model.{hf_name}.weight"] = weights[f"{name}.weight"]
    names = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down_t": "mlp.down_proj",
    }
    for layer in range(config.num_hidden_layers):
        for name, hf_name in names.items():
            values = weights[f"blk.{layer}.{name}.weight"]
            if name in ("attn_q", "attn_k"):  # pairs (2i, 2i + 1) back to halves of a head
                pairs = values.reshape(-1, config.head_dim // 2, 2, config.hidden_size)
                values = pairs.swapaxes(1, 2).reshape(values.shape)
            state[f"model.layers.{layer}.{hf_name}.weight"] = values.T if name == "ffn_down_t" else values
    tensors = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in state.items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    return model.eval()


def test_fp32_equals_transformers_on_the_same_weights():
    engine = Engine.load(MODEL, compute="f32")
    prompt = engine.tokenizer.encode("The history of mathematics begins with")
    tokens = prompt + greedy(engine, "The history of mathematics begins with", 64, "exact")
    ours = engine.session(256).logits(tokens, "exact")
    with torch.no_grad():
        theirs = _reference()(torch.tensor([tokens])).logits[0].numpy()
    error = logits_error(ours, theirs)
    assert error.max() <= 1e-3
    assert tokens[len(prompt) :] == theirs[len(prompt) - 1 : -1].argmax(-1).tolist()


def test_it_is_sparse_and_it_chats():
    engine = Engine.load(MODEL)
    prompt = engine.tokenizer.apply_chat_template([{"role": "user", "content": "What is photosynthesis?"}])
    session = engine.session(256)
    session.prefill(engine.tokenizer.encode(prompt, add_bos=False, parse_special=True), "exact")
    for _ in range(32):
        session.decode(session.sample(SamplingParams()), "exact")
    traffic = engine.traffic()
    assert traffic.sparsity is not None and traffic.sparsity > 0.8
