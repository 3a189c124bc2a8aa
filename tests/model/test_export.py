"""The exported file holds the weights of the folder, where and how the layout says, and is whole or not there."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from factories import ACTIVATIONS, CHAT_TEMPLATE, FAMILY_NAMES, MIXTURES, make_folder
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from turbosparse.errors import UserError
from turbosparse.model import export
from turbosparse.model.config import ModelConfig
from turbosparse.model.export import QUANTS, export_gguf
from turbosparse.model.families import FAMILIES
from turbosparse.model.gguf import GGUFFile
from turbosparse.model.quantize import dequantize
from turbosparse.model.tokenizer import Tokenizer

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Hugging Face name of each part of a block, in llama.cpp's names; norms differ where a family has post-norms.
PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_down_t": "mlp.down_proj",
}
NORMS = {"ffn_norm": "post_attention_layernorm"}
POST_NORMS = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def _hf_name(name, family):
    whole = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    stem, kind = name.rsplit(".", 1)
    if stem in whole:
        return f"{whole[stem]}.{kind}"
    _, layer, part = stem.split(".")
    parts = PARTS | (POST_NORMS if family.startswith("gemma") else NORMS)
    return f"model.layers.{layer}.{parts[part]}.{kind}"


def _expected(name, hf, family, n_heads):
    """What llama.cpp's converter would write, spelled out row by row instead of by reshaping."""
    values = hf[_hf_name(name, family)]
    part = name.split(".")[-2]
    if part.endswith("norm") and family.startswith("gemma"):
        return values + 1
    if part in ("attn_q", "attn_k") and family in ("llama", "mistral"):
        head_dim = len(values) // n_heads[part]
        half = head_dim // 2
        order = [h * head_dim + p * half + i for h in range(n_heads[part]) for i in range(half) for p in (0, 1)]
        return values[order]
    return values.T if part == "ffn_down_t" else values


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_tensor_is_that_of_the_folder(tiny_folder, tiny_gguf, family, activation):
    hf = load_file(tiny_folder(family, activation) / "model.safetensors")
    hf.setdefault("lm_head.weight", hf["model.embed_tokens.weight"])
    used = {"lm_head.weight"}
    with GGUFFile.open(tiny_gguf(family, activation)) as file:
        for name, tensor in file.tensors.items():
            used.add(_hf_name(name, family))
            stored = dequantize(tensor.data, tensor.type, tensor.shape)
            np.testing.assert_array_equal(stored, _expected(name, hf, family, {"attn_q": 4, "attn_k": 2}), err_msg=name)
    assert used == set(hf)


EXPERT_PARTS = {"mixtral": ("w1", "w3", "w2"), "qwen3moe": ("gate_proj", "up_proj", "down_proj")}


@pytest.mark.parametrize("activation", ["dense", "drelu"])
@pytest.mark.parametrize("family", MIXTURES)
def test_every_expert_is_that_of_the_folder(tiny_folder, tiny_gguf, family, activation):
    hf = load_file(tiny_folder(family, activation) / "model.safetensors")
    gate, up, down = EXPERT_PARTS[family]
    parts = {"gate": gate, "up": up, "down_t" if activation == "drelu" else "down": down}
    with GGUFFile.open(tiny_gguf(family, activation)) as file:
        assert sum(tensor.size for tensor in file.tensors.values()) == sum(tensor.size for tensor in hf.values())
        for layer in range(2):
            before = f"model.layers.{layer}.{'block_sparse_moe' if family == 'mixtral' else 'mlp'}"
            router = file.tensors[f"blk.{layer}.ffn_gate_inp.weight"]
            np.testing.assert_array_equal(
                dequantize(router.data, router.type, router.shape), hf[f"{before}.gate.weight"]
            )
            for name, part in parts.items():
                tensor = file.tensors[f"blk.{layer}.ffn_{name}_exps.weight"]
                for expert, stored in enumerate(dequantize(tensor.data, tensor.type, tensor.shape)):
                    theirs = hf[f"{before}.experts.{expert}.{part}.weight"]
                    np.testing.assert_array_equal(stored, theirs.T if name == "down_t" else theirs)


def _fused(tensors):
    """The same checkpoint as transformers has a Mixtral in memory: the experts of a layer in two tensors."""
    fused = {}
    for name, values in tensors.items():
        if ".experts." not in name:
            fused[name.replace("block_sparse_moe", "mlp")] = values
    for layer in range(2):
        w1, w2, w3 = (
            np.stack([tensors[f"model.layers.{layer}.block_sparse_moe.experts.{e}.{part}.weight"] for e in range(5)])
            for part in ("w1", "w2", "w3")
        )
        fused[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = np.concatenate([w1, w3], axis=1)
        fused[f"model.layers.{layer}.mlp.experts.down_proj"] = w2
    return fused


@pytest.mark.parametrize("activation", ["dense", "drelu"])
def test_experts_in_one_tensor_become_the_same_file(tiny_folder, tiny_gguf, tmp_path, activation):
    folder = _copy(tiny_folder("mixtral", activation), tmp_path / f"mixtral-{activation}")
    weights = folder / "model.safetensors"
    save_file(_fused(load_file(weights)), weights)
    export_gguf(folder, tmp_path / "a.gguf", "f32")
    assert (tmp_path / "a.gguf").read_bytes() == tiny_gguf("mixtral", activation).read_bytes()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("model.layers.1.block_sparse_moe.experts.3.w2.weight"), r"experts\.3\.w2"),
        (lambda t: t.pop("model.layers.1.block_sparse_moe.gate.weight"), r"block_sparse_moe\.gate"),
        (
            lambda t: t.update({"model.layers.1.block_sparse_moe.experts.5.w1.weight": np.zeros((96, 64), "f4")}),
            "no known",
        ),
        (
            lambda t: t.update({"model.layers.1.block_sparse_moe.experts.2.w1.weight": np.zeros((64, 96), "f4")}),
            "shape",
        ),
    ],
)
def test_a_mixture_that_is_not_whole_is_refused(tiny_folder, tmp_path, change, named):
    folder = _copy(tiny_folder("mixtral"), tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=named):
        export_gguf(folder, tmp_path / "a.gguf", "f32")


@pytest.mark.parametrize("shape", [(4, 192, 64), (5, 191, 64), (5, 192, 32), (960, 64)])
def test_experts_in_one_tensor_of_another_shape_are_refused(tiny_folder, tmp_path, shape):
    folder = _copy(tiny_folder("mixtral"), tmp_path / "hf")
    tensors = _fused(load_file(folder / "model.safetensors"))
    tensors["model.layers.0.mlp.experts.gate_up_proj"] = np.zeros(shape, np.float32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match="shape"):
        export_gguf(folder, tmp_path / "a.gguf", "f32")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_file_names_its_architecture_and_layout(tiny_gguf, family, activation):
    with GGUFFile.open(tiny_gguf(family, activation)) as file:
        metadata, names = file.metadata, set(file.tensors)
    if activation == "dense":
        assert metadata["general.architecture"] == FAMILIES[family].gguf_architecture
        assert not any(key.startswith("turbosparse") for key in metadata)
        assert "blk.0.ffn_down.weight" in names and "blk.0.ffn_down_t.weight" not in names
    else:
        assert metadata["general.architecture"] == "turbosparse"
        assert metadata["turbosparse.base"] == family
        assert metadata["turbosparse.activation"] == activation
        assert metadata["turbosparse.format_version"] == 1
        assert "blk.0.ffn_down_t.weight" in names and "blk.0.ffn_down.weight" not in names
    assert metadata["general.file_type"] == 0 and metadata["general.quantization_version"] == 2
    assert metadata["general.name"] == f"{family}-{activation}"
    assert metadata["tokenizer.chat_template"] == CHAT_TEMPLATE


@pytest.mark.parametrize("quant", QUANTS)
def test_each_quantisation_has_its_types_and_its_error(tiny_folder, tiny_gguf, quant):
    matrix, embedding = {"q4_0": ("Q4_0", "Q8_0"), "q8_0": ("Q8_0", "Q8_0"), "f16": ("F16",) * 2, "f32": ("F32",) * 2}[
        quant
    ]
    # Relative error of a tensor of normal weights: 4 bits, 8 bits, 11 bits of mantissa, none.
    bound = {"Q4_0": 0.095, "Q8_0": 0.006, "F16": 3e-4, "F32": 0.0}
    hf = load_file(tiny_folder("qwen3") / "model.safetensors")
    with GGUFFile.open(tiny_gguf("qwen3", "dense", quant)) as file:
        for name, tensor in file.tensors.items():
            kind = "F32" if "norm" in name else embedding if name in ("token_embd.weight", "output.weight") else matrix
            assert tensor.type.name == kind, name
            wanted = hf[_hf_name(name, "qwen3")]
            stored = dequantize(tensor.data, tensor.type, tensor.shape)
            assert np.linalg.norm(stored - wanted) <= bound[kind] * np.linalg.norm(wanted), name


def test_rows_that_are_not_whole_blocks_become_f16(tmp_path):
    folder = make_folder(tmp_path / "hf", "llama", "dense", intermediate_size=72)
    export_gguf(folder, tmp_path / "a.gguf", "q4_0")
    with GGUFFile.open(tmp_path / "a.gguf") as file:
        assert file.tensors["blk.0.ffn_down.weight"].type.name == "F16"
        assert file.tensors["blk.0.ffn_up.weight"].type.name == "Q4_0"


def test_the_report_tells_what_lies_there(tiny_folder, tmp_path):
    seen = []
    report = export_gguf(tiny_folder("qwen2", "drelu"), tmp_path / "a.gguf", "q8_0", lambda *at: seen.append(at))
    weights = load_file(tiny_folder("qwen2", "drelu") / "model.safetensors")
    assert report.path == tmp_path / "a.gguf"
    assert report.file_bytes == report.path.stat().st_size
    assert report.parameters == sum(array.size for array in weights.values())
    assert (report.quant, report.architecture) == ("q8_0", "turbosparse")
    assert seen[-1] == (report.parameters, report.parameters)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert len(gguf.GGUFReader(report.path).tensors) == len(seen)


def test_the_tokenizer_travels_with_the_weights(tiny_folder, tiny_gguf):
    hf = AutoTokenizer.from_pretrained(tiny_folder("llama", "drelu"))
    with GGUFFile.open(tiny_gguf("llama", "drelu")) as file:
        ours = Tokenizer.from_gguf(file)
    text = "If x + y = 7, then <|im_end|> 12345 façade 😀"
    assert ours.encode(text, add_bos=False, parse_special=True) == hf.encode(text, add_special_tokens=False)
    messages = [{"role": "user", "content": "hello"}]
    assert ours.apply_chat_template(messages) == hf.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize("where", ["config.json", "README.md"])
def test_the_licence_travels_too(tiny_folder, tmp_path, where):
    folder = _copy(tiny_folder("llama"), tmp_path / "hf")
    if where == "config.json":
        _edit(folder, license="apache-2.0")
    else:
        (folder / where).write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# Model\n")
    export_gguf(folder, tmp_path / "a.gguf", "q8_0")
    with GGUFFile.open(tmp_path / "a.gguf") as file:
        assert file.metadata["general.license"] == "apache-2.0"


def test_llama3_frequencies_are_those_of_transformers(tmp_path):
    folder = make_folder(tmp_path / "hf", "llama", "drelu", rope_parameters=LLAMA3_ROPE)
    export_gguf(folder, tmp_path / "a.gguf", "f32")
    with GGUFFile.open(tmp_path / "a.gguf") as file:
        ModelConfig.from_gguf(file)
        tensor = file.tensors["rope_freqs.weight"]
        factors = dequantize(tensor.data, tensor.type, tensor.shape)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](AutoConfig.from_pretrained(folder), "cpu")
    plain = 1e4 ** (-np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(plain / factors, scaled.numpy(), rtol=1e-5)
    assert factors.max() == 8.0 and factors.min() == 1.0


# What transformers 5.17 does not take from a GGUF file, though it stands there or follows from it as in llama.cpp.
UNREAD = {"qwen3": {"head_dim": 32}, "gemma2": {"query_pre_attn_scalar": 32}, "gemma3": {"query_pre_attn_scalar": 32}}


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_dense_file_computes_in_transformers_what_the_folder_does(tiny_folder, tiny_gguf, family):
    path = tiny_gguf(family)
    source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    config = AutoConfig.from_pretrained(**source)
    config.update(UNREAD.get(family, {}))
    tokens = torch.arange(3, 43)[None] * 7 % 400
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tiny_folder(family), dtype=torch.float32)(tokens).logits
        found = AutoModelForCausalLM.from_pretrained(**source, config=config, dtype=torch.float32)(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# --- what must not be exported, and what must not be left ---


def _copy(source, target):
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def _edit(folder, **changes):
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))


def _reweigh(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def _set(name, value):
    return lambda folder: _reweigh(folder, lambda weights: weights.__setitem__(name, value(weights)))


UP = "model.layers.1.mlp.up_proj.weight"
BROKEN = {
    "a missing tensor": (lambda f: _reweigh(f, lambda w: w.pop(UP)), UP),
    "no embedding": (lambda f: _reweigh(f, lambda w: w.pop("model.embed_tokens.weight")), "embed_tokens"),
    "a wrong shape": (_set(UP, lambda w: w[UP][:-1].copy()), "shape"),
    "a bias that no such model has": (_set("model.layers.0.mlp.up_proj.bias", lambda w: np.zeros(96, "f4")), "bias"),
    "NaN": (_set(UP, lambda w: np.full_like(w[UP], math.nan)), "NaN"),
    "beyond half precision": (_set(UP, lambda w: np.full_like(w[UP], 1e30)), "F16"),
    "integers": (_set(UP, lambda w: w[UP].astype("i4")), "I32"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "safetensors"),
    "another model": (lambda f: _edit(f, model_type="bert"), "bert"),
    "more layers than there are": (lambda f: _edit(f, num_hidden_layers=3), "layers.2"),
    "fewer layers than there are": (lambda f: _edit(f, num_hidden_layers=1), "layers.1"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_one_sentence_and_leaves_the_old_file(tiny_folder, tmp_path, case):
    damage, named = BROKEN[case]
    folder = _copy(tiny_folder("llama"), tmp_path / "hf")
    damage(folder)
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.gguf").write_bytes(b"old")
    with pytest.raises(UserError) as caught:
        export_gguf(folder, out / "a.gguf", "f16")
    assert named in str(caught.value) and "\n" not in str(caught.value)
    assert [file.name for file in out.iterdir()] == ["a.gguf"]
    assert (out / "a.gguf").read_bytes() == b"old"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_export_leaves_nothing(tiny_folder, tmp_path, stop):
    def interrupt(done, total):
        if done > total // 2:
            assert len(list(tmp_path.iterdir())) == 1  # it was under way
            raise stop

    with pytest.raises(stop):
        export_gguf(tiny_folder("llama"), tmp_path / "a.gguf", "q4_0", interrupt)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_sentence(tiny_folder, tmp_path, monkeypatch):
    def full(self, tensor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(UserError, match="No space left"):
        export_gguf(tiny_folder("llama"), tmp_path / "a.gguf", "q4_0")
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written(tiny_folder, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for out, named in (
        (tmp_path, "folder"),
        (tmp_path / "no" / "a.gguf", "does not exist"),
        (tmp_path / "pipe", "pipe"),
    ):
        with pytest.raises(UserError, match=named):
            export_gguf(tiny_folder("llama"), out, "q4_0")
    with pytest.raises(UserError, match="q4_0, q8_0, f16, f32"):
        export_gguf(tiny_folder("llama"), tmp_path / "a.gguf", "q4_k")


def test_a_model_is_exported_without_torch(tiny_folder, tmp_path):
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from turbosparse.model.export import export_gguf\n"
        f"export_gguf({str(tiny_folder('llama', 'drelu'))!r}, {str(tmp_path / 'a.gguf')!r}, 'q4_0')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ, timeout=120)
    assert (tmp_path / "a.gguf").is_file()


# --- llama.cpp, on a real model: <models>/smollm2-dense and <models>/smollm2-drelu, Hugging Face folders ---

_PEER = """
import sys
import llama_cpp
# One token a batch: some builds crash in their batched kernels, on anybody's file.
model = llama_cpp.Llama(sys.argv[1], n_ctx=256, n_batch=1, n_threads=2, verbose=False)
print(model(sys.argv[2], max_tokens=24, temperature=0)["choices"][0]["text"])
"""


def _real(name):
    root = os.environ.get("TURBOSPARSE_TEST_MODELS")
    folder = Path(root) / name if root else None
    if folder is None or not folder.is_dir():
        pytest.skip(f"needs the Hugging Face folder {name} in $TURBOSPARSE_TEST_MODELS")
    return folder


def _run_llama_cpp(path):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra bench)")
    arguments = [sys.executable, "-c", _PEER, str(path), "The capital of France is"]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=300)


@pytest.mark.models
@pytest.mark.parametrize("quant", ["q4_0", "q8_0", "f16"])
def test_llama_cpp_runs_the_dense_twin(tmp_path, quant):
    export_gguf(_real("smollm2-dense"), tmp_path / "a.gguf", quant)
    run = _run_llama_cpp(tmp_path / "a.gguf")
    assert run.returncode == 0, run.stderr[-2000:]
    assert "Paris" in run.stdout


@pytest.mark.models
def test_llama_cpp_refuses_the_sparse_file(tmp_path):
    export_gguf(_real("smollm2-drelu"), tmp_path / "a.gguf", "q4_0")
    run = _run_llama_cpp(tmp_path / "a.gguf")
    assert run.returncode == 1 and "Failed to load model" in run.stderr
    assert not run.stdout.strip()


_LOGITS = """
import sys, numpy as np
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=64, logits_all=True, verbose=False, n_threads=2)
for token in map(int, sys.argv[3:]):
    model.eval([token])
np.save(sys.argv[2], model.scores[: len(sys.argv) - 3])
model.close()
"""


@pytest.mark.models
@pytest.mark.parametrize("family", MIXTURES)
def test_llama_cpp_finds_the_same_logits_in_a_mixture(tiny_gguf, tmp_path, family):
    from turbosparse.engine import Engine

    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra bench)")
    tokens = np.random.default_rng(3).integers(3, 300, size=40).tolist()
    arguments = [sys.executable, "-c", _LOGITS, tiny_gguf(family), tmp_path / "logits.npy", *tokens]
    subprocess.run(list(map(str, arguments)), capture_output=True, timeout=300, check=True)
    theirs = np.load(tmp_path / "logits.npy")
    ours = Engine.load(tiny_gguf(family), compute="f32").session().logits(tokens)
    error = np.linalg.norm(ours - theirs, axis=-1) / np.linalg.norm(theirs, axis=-1)
    assert error.max() < 5e-3  # its keys and values are float16
