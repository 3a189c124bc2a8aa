"""Keys and values: their types against a reference that rounds as they do, windows that slide, long contexts."""

import gguf
import numpy as np
import pytest
import torch
from agreement import logits_error
from factories import make_folder
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.masking_utils import eager_mask

import turbosparse  # noqa: F401  registers the sparse model types
from turbosparse.engine import Engine
from turbosparse.errors import UserError
from turbosparse.model.export import export_gguf
from turbosparse.model.shapes import shape_config
from turbosparse.model.synthetic import rates_for, write_synthetic

TOKENS = [int(token) for token in np.random.default_rng(3).integers(3, 300, size=250)]
Q8_0 = gguf.GGMLQuantizationType.Q8_0


def rounded(x: torch.Tensor) -> torch.Tensor:
    """What a cache of q8_0 makes of keys or values; heads are one block of 32, whose order does not matter."""
    flat = x.contiguous().numpy().reshape(-1, 32)
    return torch.tensor(gguf.quants.dequantize(gguf.quants.quantize(flat, Q8_0), Q8_0).reshape(x.shape))


def attention_over_q8_0(module, query, key, value, attention_mask, scaling=None, softcap=None, **_ignored):
    groups = query.shape[1] // key.shape[1]
    key, value = (rounded(each).repeat_interleave(groups, dim=1) for each in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return (torch.softmax(scores + attention_mask, dim=-1) @ value).transpose(1, 2), None


AttentionInterface.register("q8_0", attention_over_q8_0)
AttentionMaskInterface.register("q8_0", eager_mask)


def reference(folder, attention: str, tokens: list[int]) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    if attention != "eager":
        model.set_attn_implementation(attention)
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gemma3"])
def test_a_cache_of_q8_0_is_the_reference_with_rounded_keys_and_values(tiny_folder, tiny_gguf, family):
    engine = Engine.load(tiny_gguf(family, "drelu"), compute="f32", threads=2)
    ours = engine.session(256, "q8_0").logits(TOKENS)
    theirs, plain = (reference(tiny_folder(family, "drelu"), kind, TOKENS) for kind in ("q8_0", "eager"))
    # Exact until a last bit of some key decides which of two levels it gets; from then on a step away here and there.
    assert logits_error(ours, theirs)[0] < 1e-6 and logits_error(ours, theirs).max() < 5e-3
    assert np.median(logits_error(ours, theirs)) < 0.2 * np.median(logits_error(ours, plain))


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
@pytest.mark.parametrize("cache", ["f16", "q8_0"])
def test_fast_caches_are_near_the_exact_one(tiny_gguf, family, cache):
    engine = Engine.load(tiny_gguf(family, "drelu", "q8_0"), threads=2)
    exact = Engine.load(tiny_gguf(family, "drelu", "q8_0"), compute="f32").session(256).logits(TOKENS)
    error = logits_error(engine.session(256, cache).logits(TOKENS), exact)
    assert error.max() < {"f16": 0.01, "q8_0": 0.05}[cache]


@pytest.mark.parametrize("cache", ["f16", "q8_0"])
def test_any_cache_gives_the_same_bits_however_it_is_filled(tiny_gguf, cache):
    whole = None
    for threads in (1, 2, 3, 5):
        engine = Engine.load(tiny_gguf("gemma3", "drelu", "q4_0"), threads=threads)
        rows = engine.session(256, cache).logits(TOKENS)
        whole = rows if whole is None else whole
        session = engine.session(256, cache)
        pieces = [session.logits(TOKENS[start : start + 37]) for start in range(0, 111, 37)]
        single = [session.decode(token)[None] for token in TOKENS[111:]]
        other = engine.session(256, cache)
        other.prefill(TOKENS[:60])
        both = engine.decode_batch([engine.session(256, cache), other], [TOKENS[0], TOKENS[60]])
        for got, expected in (
            (rows, whole),
            (np.concatenate([*pieces, *single]), whole),
            (both, whole[[0, 60]]),
        ):
            assert np.array_equal(got.view(np.uint32), expected.view(np.uint32)), threads


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_a_window_that_slides_far_is_right(tiny_folder, tiny_gguf, family):
    """250 tokens through a window of 8, whose cells are used over and over."""
    engine = Engine.load(tiny_gguf(family, "drelu"), compute="f32", threads=2)
    session = engine.session(256)
    session.prefill(TOKENS[:100])
    single = np.stack([session.decode(token) for token in TOKENS[100:]])
    assert logits_error(single, reference(tiny_folder(family, "drelu"), "eager", TOKENS)[100:]).max() < 1e-4


def test_memory_is_that_of_the_cells_that_a_layer_can_reach(tiny_gguf):
    engine = Engine.load(tiny_gguf("gemma3", "drelu", "q4_0"))
    c = engine.config
    assert c.sliding_window == 8 and c.sliding_layers.count(True) == 6 and c.n_layers == 7
    reach = 8 + 64 - 1  # a block of a prompt is stored before its first token looks back
    rows = 2 * c.n_kv_heads * (6 * reach + 256)
    assert engine.session(256).cache_bytes == pytest.approx(rows * c.head_dim * 2, rel=0.03)
    assert engine.session(256, "q8_0").cache_bytes == pytest.approx(rows * c.head_dim * 34 / 32, rel=0.03)
    assert engine.session(16).cache_bytes == pytest.approx(2 * c.n_kv_heads * 7 * 16 * c.head_dim * 2, rel=0.05)


@pytest.mark.parametrize("cache", [None, "q8_0"])
def test_a_long_context(tmp_path, cache):
    folder = make_folder(tmp_path / "m", "qwen3", "drelu", max_position_embeddings=32768, num_hidden_layers=1)
    path = tmp_path / "m.gguf"
    export_gguf(folder, path, "f32")
    tokens = np.random.default_rng(4).integers(3, 300, size=2500).tolist()
    engine = Engine.load(path, compute="f32", threads=2)
    session = engine.session(32768, cache)
    session.prefill(tokens[:2400])
    ours = np.stack([session.decode(token) for token in tokens[2400:]])
    theirs = reference(folder, "q8_0" if cache else "eager", tokens)[2400:]
    assert logits_error(ours, theirs).max() < (5e-3 if cache else 1e-4)


def test_heads_that_are_not_whole_blocks_have_no_cache_of_q8_0(tiny_gguf):
    engine = Engine.load(tiny_gguf("llama", "drelu", "q4_0"))
    with pytest.raises(UserError, match="--kv-cache q8_0: heads of 16"):
        engine.session(16, "q8_0")
    with pytest.raises(UserError, match="--kv-cache q4: choose f16 or q8_0"):
        engine.session(16, "q4")


def test_a_poisoned_value_shows(tmp_path):
    """An infinite key or value must not become a number in a cache of q8_0."""
    path = tmp_path / "m.gguf"
    write_synthetic(path, "m", shape_config("smollm2-135m", "drelu", 1), rates_for(0.9, 0.25), "f16")
    data = bytearray(path.read_bytes())
    from turbosparse.model.gguf import GGUFFile

    with GGUFFile.open(path) as file:
        size = file.tensors["blk.0.attn_v.weight"].data.size
        place = data.find(bytes(file.tensors["blk.0.attn_v.weight"].data[:64]))
    data[place : place + size] = np.full(size // 2, np.inf, np.float16).tobytes()
    path.write_bytes(data)
    logits = Engine.load(path, threads=1).session(16, "q8_0").decode(5)
    assert np.isnan(logits).any()
