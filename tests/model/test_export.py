"""The exported file holds the weights of the folder, where and how the layout says."""

import gguf
import numpy as np
import pytest
import torch
from factories import ACTIVATIONS, CHAT_TEMPLATE, FAMILY_NAMES, make_folder
from folders import copy_folder, edit_config
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

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
    folder = copy_folder(tiny_folder("llama"), tmp_path / "hf")
    if where == "config.json":
        edit_config(folder, license="apache-2.0")
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
