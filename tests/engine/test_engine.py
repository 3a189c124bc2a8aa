"""The engine on tiny models of every family: right against transformers, and bitwise the same however it is run."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from agreement import TOKENS, check_same_bits, equal_bits, logits_error
from factories import FAMILY_NAMES, make_folder
from gguf import GGMLQuantizationType
from gguf_files import copy_metadata
from transformers import AutoModelForCausalLM

import turbosparse  # noqa: F401  registers the sparse model types
from turbosparse import _native
from turbosparse.engine import Engine, SamplingParams
from turbosparse.errors import UserError
from turbosparse.model.export import export_gguf
from turbosparse.model.gguf import GGUFFile
from turbosparse.model.shapes import shape_config
from turbosparse.model.synthetic import Rates, write_synthetic


@pytest.mark.parametrize("activation", ["dense", "drelu", "reglu"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_fp32_logits_are_those_of_transformers(tiny_folder, tiny_gguf, family, activation):
    engine = Engine.load(tiny_gguf(family, activation), compute="f32")
    model = AutoModelForCausalLM.from_pretrained(  # eager: transformers' sdpa leaves out Gemma 2's softcap
        tiny_folder(family, activation), dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        theirs = model(torch.tensor([TOKENS])).logits[0].numpy()
    for mode in engine.modes:
        ours = engine.session().logits(TOKENS, mode)
        assert logits_error(ours, theirs).max() < 1e-4, mode


@pytest.mark.parametrize("quant", ["q4_0", "q8_0", "f16", "f32"])
@pytest.mark.parametrize("isa", _native.isas())
def test_decode_prefill_threads_and_modes_give_the_same_bits(tiny_gguf, isa, quant):
    check_same_bits(tiny_gguf("llama", "drelu", quant), isa, (1, 2, 3, 5))


@pytest.mark.parametrize("activation", ["drelu", "reglu"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("compute", ["int8", "f32"])
def test_exact_is_dense_in_every_family(tiny_gguf, family, activation, compute):
    engine = Engine.load(tiny_gguf(family, activation, "q8_0"), compute=compute, threads=2)
    dense, exact = engine.session(), engine.session()
    assert equal_bits(dense.prefill(TOKENS[:70], "dense"), exact.prefill(TOKENS[:70], "exact"))
    for token in TOKENS[70:]:
        assert equal_bits(dense.decode(token, "dense"), exact.decode(token, "exact"))


@pytest.mark.parametrize("split", [1, 2, 63, 64, 65, 100])
def test_a_prompt_in_pieces_is_the_whole_prompt(tiny_gguf, split):
    engine = Engine.load(tiny_gguf("gemma3", "drelu", "q4_0"))
    whole, pieces = engine.session(), engine.session()
    expected = whole.prefill(TOKENS)
    pieces.prefill(TOKENS[:split])
    assert equal_bits(pieces.prefill(TOKENS[split:]), expected)
    assert pieces.position == len(TOKENS)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_loading_holds_one_copy_of_the_weights(tmp_path):
    """Peak memory rises by the packed weights and a part of the file, not by the weights and the whole file."""
    path = tmp_path / "model.gguf"
    config = shape_config("smollm2-135m", "swiglu", layers=24)
    write_synthetic(path, "peak", config, Rates(0.5, 0.5, 0.25), "q8_0")
    program = f"""
import re, turbosparse, turbosparse.engine
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) * 1024
before = peak()
engine = turbosparse.load({str(path)!r})
print(peak() - before, engine.weight_bytes)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    rise, weights = map(int, done.stdout.split())
    assert weights > 100e6 and rise < 1.5 * weights


def test_sessions_do_not_disturb_each_other(tiny_gguf):
    engine = Engine.load(tiny_gguf("qwen3", "dense", "q8_0"))
    alone = engine.session().logits(TOKENS[:20])
    a, b = engine.session(), engine.session()
    rows = []
    for token in TOKENS[:20]:
        rows.append(a.decode(token))
        b.decode(7)
    assert equal_bits(np.stack(rows), alone)
    a.reset()
    assert a.position == 0 and equal_bits(a.logits(TOKENS[:20]), alone)


@pytest.mark.parametrize("mode", ["dense", "exact"])
def test_traffic_counts_the_rows_that_are_read(tiny_gguf, mode):
    engine = Engine.load(tiny_gguf("llama", "drelu", "q8_0"), threads=3)
    session = engine.session()
    session.prefill(TOKENS[:5], mode)
    assert engine.traffic().tokens == 0 and engine.traffic().sparsity is None
    for token in TOKENS[5:9]:
        session.decode(token, mode)
    traffic = engine.traffic(reset=True)
    c = engine.config
    row = c.hidden_size // 32 * 34
    q_size, kv_size = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    fixed = c.n_layers * ((q_size + 2 * kv_size) * row + c.hidden_size * (q_size // 32 * 34)) + (c.vocab_size + 1) * row
    neurons = c.n_layers * c.ffn_size
    rows = 3 * neurons if mode == "dense" else neurons * (1 + traffic.open + traffic.active)
    assert traffic.bytes == 4 * fixed + round(4 * rows) * row
    assert 0 < traffic.active < traffic.open < 1 and traffic.sparsity == 1 - traffic.active
    assert engine.traffic().tokens == 0


@pytest.mark.parametrize("activation", ["drelu", "reglu"])
def test_an_activation_threshold_drops_what_transformers_drops(tmp_path, activation):
    folder = make_folder(tmp_path / "hf", "llama", activation, activation_threshold=[0.02, 0.3])
    export_gguf(folder, tmp_path / "m.gguf", "f32")
    engine = Engine.load(tmp_path / "m.gguf", compute="f32", threads=2)
    assert engine.config.activation_thresholds == tuple(np.float32([0.02, 0.3]).tolist())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    kept: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.tap = lambda gate, up, h: kept.append((h[0] != 0).sum(0))
    with torch.no_grad():
        theirs = model(torch.tensor([TOKENS])).logits[0].numpy()
    engine.count_activations()
    dense = engine.session().logits(TOKENS, "dense")
    counted = engine.counters().h
    exact = engine.session()
    assert equal_bits(np.stack([exact.decode(token, "exact") for token in TOKENS]), dense)
    assert logits_error(dense, theirs).max() < 1e-4
    assert np.abs(counted - torch.stack(kept).numpy()).max() <= 1  # a product within rounding of the threshold
    assert 0 < counted[1].sum() < 0.7 * counted[0].sum()


@pytest.mark.parametrize("activation", ["drelu", "reglu"])
def test_counters_are_what_the_taps_of_the_reference_see(tiny_folder, tiny_gguf, activation):
    engine = Engine.load(tiny_gguf("llama", activation), compute="f32", threads=2)
    engine.count_activations()
    engine.session().logits(TOKENS, "dense")
    counts = engine.counters(reset=True)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder("llama", activation), dtype=torch.float32)
    for index, layer in enumerate(model.model.layers):

        def tap(gate: torch.Tensor, up: torch.Tensor, h: torch.Tensor, index: int = index) -> None:
            for ours, theirs in ((counts.gate, gate > 0), (counts.up, up > 0), (counts.h, h != 0)):
                difference = np.abs(ours[index] - theirs[0].sum(0).numpy())
                assert difference.max() <= 1 and difference.mean() < 0.01  # a pre-activation within rounding of zero

        layer.mlp.tap = tap
    with torch.no_grad():
        model(torch.tensor([TOKENS]))
    assert counts.tokens == len(TOKENS) and counts.h.shape == (engine.config.n_layers, engine.config.ffn_size)
    assert engine.counters().tokens == 0 and not engine.counters().h.any()


def test_counting_changes_no_bit_and_agrees_between_prompt_and_decoding(tiny_gguf):
    engine = Engine.load(tiny_gguf("mistral", "drelu", "q4_0"), threads=2)
    plain = engine.session().logits(TOKENS, "exact")
    engine.count_activations()
    counted = engine.session().logits(TOKENS, "exact")
    prompt = engine.counters(reset=True)
    session = engine.session()
    decoded = np.stack([session.decode(token, "exact") for token in TOKENS])
    single = engine.counters()
    assert equal_bits(plain, counted) and equal_bits(plain, decoded)
    for name in ("gate", "up", "h"):
        assert np.array_equal(getattr(prompt, name), getattr(single, name)) and getattr(prompt, name).any()


def test_what_cannot_be_run_is_said_in_one_sentence(tiny_gguf, tmp_path):
    path = tiny_gguf("llama", "dense", "q8_0")
    engine = Engine.load(path)
    with pytest.raises(UserError, match="mode exact"):
        engine.session().decode(5, "exact")
    with pytest.raises(UserError, match="do not fit the context of 16"):
        engine.session(16).prefill(list(range(3, 20)))
    with pytest.raises(UserError, match="--ctx"):
        engine.session(1 << 30)
    with pytest.raises(UserError, match="no tokens"):
        engine.session().prefill([])
    with pytest.raises(UserError, match="--isa sse9"):
        Engine.load(path, isa="sse9")
    with pytest.raises(UserError, match="--compute bf8"):
        Engine.load(path, compute="bf8")
    with pytest.raises(ValueError, match="outside of the vocabulary"):
        engine.session().prefill([engine.config.vocab_size])
    full = engine.session(4)
    full.prefill([3, 4, 5, 6])
    with pytest.raises(UserError, match="4 of it used"):
        full.decode(7)


def test_other_quantisations_are_converted_at_load_with_progress(tiny_folder, tmp_path):
    """A file in Q4_1 and Q6_K, as others write them: fp32 is exact, int8 near it."""
    import gguf

    from turbosparse.model.export import export_gguf
    from turbosparse.model.gguf import GGUFFile

    source = tmp_path / "f32.gguf"
    export_gguf(tiny_folder("qwen2"), source, "f32")
    path = tmp_path / "q4_1.gguf"
    with GGUFFile.open(source) as file:
        rewrite(file, path, lambda _: gguf.GGMLQuantizationType.Q4_1)
    seen = []
    exact = Engine.load(path, compute="f32", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0 and seen == sorted(seen)
    fast = Engine.load(path)
    a, b = exact.session().logits(TOKENS), fast.session().logits(TOKENS)
    error = logits_error(b, a)
    assert 0 < error.max() < 0.1  # 8-bit activations and weights: about 1 % a product, over two layers


def test_a_matrix_without_blocks_beside_fine_inputs_is_multiplied_once(tiny_folder, tmp_path):
    """Q8_0 matrices take inputs in two int8 terms; an F16 one takes the input itself, and not the second term too."""
    import gguf

    from turbosparse.model.export import export_gguf
    from turbosparse.model.gguf import GGUFFile

    source, path = tmp_path / "f32.gguf", tmp_path / "mixed.gguf"
    export_gguf(tiny_folder("qwen2"), source, "f32")
    kinds = gguf.GGMLQuantizationType
    with GGUFFile.open(source) as file:
        rewrite(file, path, lambda name: kinds.F16 if name == "token_embd.weight" else kinds.Q8_0)
    exact, fast = (Engine.load(path, compute=compute).session().logits(TOKENS) for compute in ("f32", "int8"))
    error = logits_error(fast, exact)
    assert error.max() < 1e-3


@pytest.mark.parametrize("count", [447, 449])
def test_a_file_with_fewer_or_more_tokens_than_rows_is_refused(tiny_gguf, tmp_path, count):
    with GGUFFile.open(tiny_gguf("llama", "drelu")) as file:
        for name, filler in (("tokens", "more"), ("token_type", 4)):
            values = file.metadata[f"tokenizer.ggml.{name}"]
            file.metadata[f"tokenizer.ggml.{name}"] = [*values, filler][:count]
        rewrite(file, tmp_path / "lie.gguf", lambda _: GGMLQuantizationType.F32)
    with pytest.raises(UserError, match=rf"lie\.gguf: it has {count} tokens .* 448 rows"):
        Engine.load(tmp_path / "lie.gguf")


def rewrite(file, path, kind) -> None:
    """Write a GGUF file again with its matrices in other types, `kind(name)`."""
    import gguf

    writer = gguf.GGUFWriter(path, file.metadata["general.architecture"])
    copy_metadata(file, writer)
    for name, tensor in file.tensors.items():
        values = np.frombuffer(tensor.data, np.float32).reshape(tensor.shape)
        if values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            to = kind(name)
            writer.add_tensor(name, gguf.quants.quantize(values, to), raw_dtype=to)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("family", ["llama", "gemma3"])  # gemma3: layers that slide by 8
@pytest.mark.parametrize("kept", [0, 1, 63, 70])
def test_what_is_kept_of_a_cache_keeps_its_bits(tiny_gguf, family, kept):
    engine = Engine.load(tiny_gguf(family, "drelu", "q8_0"))
    other = TOKENS[:kept] + [token + 1 for token in TOKENS[kept:]]
    session = engine.session()
    session.prefill(TOKENS)
    # A window that has moved on too far begins anew.
    reached = kept if family == "llama" or len(TOKENS) - kept <= _native.PREFILL_BLOCK else 0
    assert session.keep_prefix(other) == reached == session.position
    assert equal_bits(session.logits(other[reached:]), engine.session().logits(other)[reached:])


def test_a_window_that_went_back_twice_keeps_its_bits(tiny_gguf):
    """Cells that a longer text has overwritten stay lost after going back a little and forth again."""
    engine = Engine.load(tiny_gguf("gemma3", "drelu", "q8_0"))
    tokens = [*TOKENS, *TOKENS]
    session = engine.session()
    session.prefill(tokens)
    back = len(tokens) - 60
    assert session.truncate(back) == back
    session.prefill(tokens[back : back + 10])
    assert session.truncate(back - 20) == 0  # within 64 of the position, but not of the furthest one
    again = session.logits(tokens[: back - 20])
    assert equal_bits(again, engine.session().logits(tokens[: back - 20]))


def test_one_token_is_left_to_read_and_a_cache_grows_only_by_reading(tiny_gguf):
    engine = Engine.load(tiny_gguf("llama", "drelu", "q8_0"))
    session = engine.session()
    after = session.prefill(TOKENS[:9])
    assert session.keep_prefix(TOKENS[:9]) == 8 and equal_bits(session.prefill(TOKENS[8:9]), after)
    assert session.keep_prefix(TOKENS[:20]) == 9 and session.keep_prefix(TOKENS[:4]) == 3
    for position in (-1, 4):
        with pytest.raises(ValueError, match="does not reach"):
            session.truncate(position)
    session.truncate(2)
    with pytest.raises(ValueError, match="no logits to sample"):
        session.sample(SamplingParams())


def test_the_file_is_released_while_it_is_packed(tiny_gguf, monkeypatch):
    """Every matrix is a piece at least, so that loading never holds a whole file beside its packed copy."""
    path = tiny_gguf("llama", "drelu", "q4_0")
    released = []
    monkeypatch.setattr(GGUFFile, "release_pages", lambda file: released.append(file.path))
    Engine.load(path)
    with GGUFFile.open(path) as file:
        matrices = sum(len(tensor.shape) > 1 for tensor in file.tensors.values())
    assert released == [path] * matrices
