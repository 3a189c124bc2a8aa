"""A model is the same whether its config.json or its GGUF file describes it; impossible descriptions are refused."""

import json
from dataclasses import replace

import pytest
from factories import ACTIVATIONS, FAMILY_NAMES, MIXTURES, make_folder
from folders import copy_folder, edit_config
from gguf_files import edit_gguf

from turbosparse.engine import Engine
from turbosparse.errors import UserError
from turbosparse.model import config_gguf
from turbosparse.model.config import ModelConfig
from turbosparse.model.export import export_gguf
from turbosparse.model.families import BY_ARCHITECTURE, FAMILIES, MIXTURES_BY_ARCHITECTURE
from turbosparse.model.gguf import GGUFFile


def _from_folder(folder):
    return ModelConfig.from_hf(json.loads((folder / "config.json").read_text()))


def _from_file(path):
    with GGUFFile.open(path) as file:
        return ModelConfig.from_gguf(file)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("family", [*FAMILY_NAMES, *MIXTURES])
def test_both_sides_describe_the_same_model(tiny_folder, tiny_gguf, family, activation):
    expected = _from_folder(tiny_folder(family, activation))
    assert expected.activation == (FAMILIES[family].activation if activation == "dense" else activation)
    assert expected.family == family
    if activation == "dense":  # llama.cpp's layout does not tell a Mistral from a Llama
        families = MIXTURES_BY_ARCHITECTURE if family in MIXTURES else BY_ARCHITECTURE
        expected = replace(expected, family=families[FAMILIES[family].gguf_architecture].name)
    assert (expected.experts > 0) == (family in MIXTURES)
    assert _from_file(tiny_gguf(family, activation)) == expected


@pytest.mark.parametrize("activation", ["dense", "drelu"])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"tie_word_embeddings": False, "rms_norm_eps": 1e-5}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
        ("mistral", {"sliding_window": 16}),
        ("mistral", {"head_dim": 32}),
        ("gemma2", {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0}),
        ("gemma3", {"sliding_window": 64}),
    ],
    ids=str,
)
def test_unusual_values_survive_the_export(tmp_path, family, changes, activation):
    folder = make_folder(tmp_path / "hf", family, activation, **changes)
    export_gguf(folder, tmp_path / "a.gguf", "q8_0")
    config, expected = _from_file(tmp_path / "a.gguf"), _from_folder(folder)
    assert replace(config, family=family) == expected
    plain = _from_folder(make_folder(tmp_path / "plain", family, activation))
    assert plain != expected


def test_a_sparse_file_states_what_the_family_would_not(tmp_path):
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    folder = make_folder(tmp_path / "hf", "gemma2", "drelu", layer_types=kinds, query_pre_attn_scalar=48)
    export_gguf(folder, tmp_path / "a.gguf", "f16")
    config = _from_file(tmp_path / "a.gguf")
    assert config == _from_folder(folder)
    assert config.sliding_layers == (False, True, False)
    assert config.attention_scale == pytest.approx(48**-0.5)


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("gemma3", {"query_pre_attn_scalar": 48}, "attention scale"),
        ("gemma2", {"layer_types": ["full_attention"] * 2 + ["sliding_attention"]}, "sliding layers"),
        ("llama", {"hidden_act": "gelu_pytorch_tanh"}, "activation geglu"),
        (
            "qwen2",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 1e4,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
            "llama3",
        ),
    ],
)
def test_a_dense_file_refuses_what_its_layout_cannot_say(tmp_path, family, changes, named):
    folder = make_folder(tmp_path / "hf", family, **changes)
    with pytest.raises(UserError, match=named):
        export_gguf(folder, tmp_path / "a.gguf", "f16")
    assert not list(tmp_path.glob("*.gguf*")) + list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "bert"}, "bert"),
        ({"model_type": None}, "not supported"),
        ({"model_type": ["llama"]}, "not supported"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": -64}, "hidden_size"),
        ({"hidden_size": 1 << 60}, "hidden_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "evenly"),
        ({"head_dim": 15}, "odd"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ({"hidden_size": 10**400}, "hidden_size"),
        ({"num_local_experts": 8}, "mixture of experts"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {}}, "quantised"),
        ({"hidden_act": "tanh"}, "tanh"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"),
        ({"rope_parameters": []}, None),
        ({"rope_parameters": 7}, "rope_parameters"),
    ],
    ids=lambda case: str(case)[:60],
)
def test_an_impossible_config_is_one_sentence(tiny_folder, changes, named):
    values = json.loads((tiny_folder("llama") / "config.json").read_text()) | changes
    if named is None:  # an empty list is as good as nothing
        assert ModelConfig.from_hf(values).rope_theta == 10000.0
        return
    with pytest.raises(UserError, match=named) as caught:
        ModelConfig.from_hf(values, "some/config.json")
    message = str(caught.value)
    assert message.startswith("some/config.json") and message.endswith(".") and "\n" not in message
    assert len(message) < 300


def test_layers_of_no_kind_are_one_sentence(tiny_folder):
    values = json.loads((tiny_folder("gemma2") / "config.json").read_text())
    for kinds in (["none"] * 3, [["full_attention"]] * 3):
        with pytest.raises(UserError, match="layer_types"):
            ModelConfig.from_hf(values | {"layer_types": kinds})


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("mixtral", {"num_local_experts": 0}, "num_local_experts"),
        ("mixtral", {"num_local_experts": None}, "num_local_experts"),
        ("mixtral", {"num_local_experts": 1 << 20}, "num_local_experts"),
        ("mixtral", {"num_local_experts": [5, 6]}, "num_local_experts"),
        ("mixtral", {"num_experts_per_tok": 0}, "num_experts_per_tok"),
        ("mixtral", {"num_experts_per_tok": 6}, "num_experts_per_tok"),
        ("qwen3moe", {"norm_topk_prob": False}, "norm_topk_prob"),
        ("qwen3moe", {"mlp_only_layers": [1]}, "mlp_only_layers"),
        ("qwen3moe", {"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ("qwen3moe", {"moe_intermediate_size": 0}, "moe_intermediate_size"),
    ],
    ids=str,
)
def test_an_impossible_mixture_is_one_sentence(tiny_folder, family, changes, named):
    values = json.loads((tiny_folder(family) / "config.json").read_text())
    assert ModelConfig.from_hf(values).experts_used == values["num_experts_per_tok"]
    with pytest.raises(UserError, match=named) as caught:
        ModelConfig.from_hf(values | changes, "some/config.json")
    assert str(caught.value).startswith("some/config.json") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "version"),
    [
        ({}, 1),
        ({"activation_threshold": [0.1, 0.2]}, 2),
        ({"neurons_per_gate": 1}, 1),
        ({"neurons_per_gate": 3}, 4),
        ({"neurons_per_gate": 2, "activation_threshold": [0.1, 0.2]}, 4),
    ],
    ids=str,
)
def test_shared_gates_are_a_key_and_a_version_that_only_their_files_have(tmp_path, changes, version):
    folder = make_folder(tmp_path / "hf", "llama", "drelu", **changes)
    export_gguf(folder, tmp_path / "a.gguf", "q8_0")
    group = changes.get("neurons_per_gate", 1)
    config = _from_file(tmp_path / "a.gguf")
    assert config == _from_folder(folder) and config.neurons_per_gate == group
    with GGUFFile.open(tmp_path / "a.gguf") as file:
        assert file.metadata["turbosparse.format_version"] == version
        assert file.metadata.get("turbosparse.neurons_per_gate") == (None if group == 1 else group)
        assert file.metadata["turbosparse.feed_forward_length"] == 96 == file.tensors["blk.1.ffn_up.weight"].shape[0]
        assert file.tensors["blk.1.ffn_gate.weight"].shape == (96 // group, 64)


def _with_group(source, out, group):
    return edit_gguf(source, out, {"turbosparse.neurons_per_gate": group, "turbosparse.format_version": 4})


GROUPS = [
    (5, "96 neurons cannot share gates evenly, 5 to a gate"),
    (0, "neurons_per_gate is 0, not from 1 to 64"),
    (96, "neurons_per_gate is 96, not from 1 to 64"),
    (4_000_000_000, "neurons_per_gate is 4000000000, not from 1 to 64"),
    ("2", "neurons_per_gate is '2', not one whole number"),
    (True, "neurons_per_gate is True, not one whole number"),
]


@pytest.mark.parametrize(("group", "problem"), [*GROUPS, (2, r"'blk.0.ffn_gate.weight' has the shape \(96, 64\)")])
def test_a_file_whose_gates_cannot_be_shared_so_is_one_sentence(tiny_gguf, tmp_path, group, problem):
    path = _with_group(tiny_gguf("llama", "drelu"), tmp_path / "a.gguf", group)
    with pytest.raises(UserError, match=problem) as caught:
        Engine.load(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and message.endswith(".") and "\n" not in message


@pytest.mark.parametrize(("group", "problem"), [*GROUPS, (-2, "-2, not from"), (10**400, "not from"), (1.5, "1.5")])
def test_a_folder_whose_gates_cannot_be_shared_so_is_one_sentence(tiny_folder, group, problem):
    values = json.loads((tiny_folder("llama", "drelu") / "config.json").read_text())
    with pytest.raises(UserError, match=problem) as caught:
        ModelConfig.from_hf(values | {"neurons_per_gate": group}, "some/config.json")
    message = str(caught.value)
    assert message.startswith("some/config.json") and message.endswith(".") and "\n" not in message


@pytest.mark.parametrize("changes", [{}, {"activation_threshold": [0.1, 0.2]}], ids=str)
@pytest.mark.parametrize("group", [2, 4])
def test_mirrored_ups_are_a_key_and_a_version_that_only_their_files_have(tmp_path, monkeypatch, group, changes):
    folder = make_folder(tmp_path / "hf", "llama", "drelu", neurons_per_gate=group, mirrored_ups=True, **changes)
    export_gguf(folder, tmp_path / "a.gguf", "q8_0")
    config = _from_file(tmp_path / "a.gguf")
    assert config == _from_folder(folder) and config.mirrored_ups and (config.ffn_size, config.up_rows) == (96, 48)
    with GGUFFile.open(tmp_path / "a.gguf") as file:
        assert file.metadata["turbosparse.format_version"] == 5
        assert file.metadata["turbosparse.mirrored_ups"] is True
        shapes = [file.tensors[f"blk.1.ffn_{part}.weight"].shape for part in ("gate", "up", "down_t")]
    assert shapes == [(96 // group, 64), (48, 64), (96, 64)]
    monkeypatch.setattr(config_gguf, "FORMAT_VERSION", 4)  # as it was before there were such files
    with pytest.raises(UserError, match="its format version is 5 but this release reads 1 to 4"):
        Engine.load(tmp_path / "a.gguf")


def test_ups_that_are_not_mirrored_leave_the_key_out(tmp_path):
    folder = make_folder(tmp_path / "hf", "llama", "drelu", neurons_per_gate=2, mirrored_ups=False)
    export_gguf(folder, tmp_path / "a.gguf", "q8_0")
    assert not _from_file(tmp_path / "a.gguf").mirrored_ups
    with GGUFFile.open(tmp_path / "a.gguf") as file:
        assert file.metadata["turbosparse.format_version"] == 4 and "turbosparse.mirrored_ups" not in file.metadata


MIRRORED = [
    ({"mirrored_ups": "yes", "neurons_per_gate": 2}, "mirrored_ups is 'yes', not true or false"),
    ({"mirrored_ups": 1, "neurons_per_gate": 2}, "mirrored_ups is 1, not true or false"),
    ({"mirrored_ups": True}, "mirrored ups need neurons that share gates in pairs, not 1 to a gate"),
    ({"mirrored_ups": True, "neurons_per_gate": 3}, "in pairs, not 3 to a gate"),
    ({"mirrored_ups": True, "neurons_per_gate": 2, "activation": "reglu"}, "need the activation drelu, not reglu"),
]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        *MIRRORED,
        (
            {"mirrored_ups": True, "neurons_per_gate": 2, "format_version": 5},
            r"ffn_up.weight' has the shape \(96, 64\), but its metadata say \(48, 64\)",
        ),
    ],
    ids=str,
)
def test_a_file_whose_ups_cannot_be_mirrored_is_one_sentence(tiny_gguf, tmp_path, changes, problem):
    keys = {f"turbosparse.{key}": value for key, value in changes.items()}
    source = tiny_gguf("llama", "drelu", "f32", 2 if changes.get("neurons_per_gate") == 2 else 1)
    path = edit_gguf(source, tmp_path / "a.gguf", keys)
    with pytest.raises(UserError, match=problem) as caught:
        Engine.load(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and message.endswith(".") and "\n" not in message


@pytest.mark.parametrize(
    ("changes", "problem"), [*MIRRORED, ({"mirrored_ups": [True]}, r"is \[True\], not true")], ids=str
)
def test_a_folder_whose_ups_cannot_be_mirrored_is_one_sentence(tiny_folder, changes, problem):
    values = json.loads((tiny_folder("llama", "drelu") / "config.json").read_text())
    with pytest.raises(UserError, match=problem) as caught:
        ModelConfig.from_hf(values | changes, "some/config.json")
    message = str(caught.value)
    assert message.startswith("some/config.json") and message.endswith(".") and "\n" not in message


def test_a_folder_whose_ups_are_not_as_its_config_says_is_one_sentence(tiny_folder, tmp_path):
    folder = copy_folder(tiny_folder("llama", "drelu", 2), tmp_path / "hf")
    edit_config(folder, mirrored_ups=True)
    with pytest.raises(UserError, match=r"up_proj.weight' has the shape \(96, 64\), but config.json says \(48, 64\)"):
        export_gguf(folder, tmp_path / "a.gguf", "q8_0")


def test_experts_do_not_share_gates(tiny_folder, tiny_gguf, tmp_path):
    values = json.loads((tiny_folder("mixtral", "drelu") / "config.json").read_text())
    with pytest.raises(UserError, match="experts whose neurons share gates"):
        ModelConfig.from_hf(values | {"neurons_per_gate": 2})
    path = _with_group(tiny_gguf("mixtral", "drelu"), tmp_path / "a.gguf", 2)
    with pytest.raises(UserError, match="experts whose neurons share gates"):
        Engine.load(path)


def test_a_dense_model_shares_no_gates(tiny_folder):
    values = json.loads((tiny_folder("llama") / "config.json").read_text())
    config = ModelConfig.from_hf(values | {"neurons_per_gate": 2, "mirrored_ups": True})
    assert config.neurons_per_gate == 1 and not config.mirrored_ups
