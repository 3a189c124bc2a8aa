"""Our models in PowerInfer's format: what its loader asks for, what its program computes, and nothing else."""

from dataclasses import replace

import numpy as np
import pytest
from agreement import TOKENS, equal_bits
from factories import TinyPredictor, add_predictor, make_folder, random_predictor
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter, quants
from gguf_files import copy_metadata

from turbosparse.engine import Engine
from turbosparse.errors import UserError
from turbosparse.model.config import ModelConfig
from turbosparse.model.export import export_gguf
from turbosparse.model.export_powerinfer import export_powerinfer
from turbosparse.model.gguf import GGUFFile
from turbosparse.model.gguf_copy import Copy, copy_tensor, write_copies
from turbosparse.model.import_powerinfer import import_model
from turbosparse.model.quantize import dequantize

FFN = 1024  # its program wants more than 1000 neurons


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """wide(activation, quant) -> the folder of a tiny llama with FFN neurons, and its file."""

    def make(activation="drelu", quant="f32", family="llama", **changes):
        folder = tmp_path_factory.mktemp("wide")
        make_folder(folder / "hf", family, activation, intermediate_size=FFN, **changes)
        export_gguf(folder / "hf", folder / "a.gguf", quant)
        return folder / "hf", folder / "a.gguf"

    return make


def _read(file, name):
    tensor = file.tensors[name]
    return dequantize(tensor.data, tensor.type, tensor.shape)


@pytest.mark.parametrize(("activation", "architecture"), [("drelu", "bamboo"), ("reglu", "llama")])
def test_the_file_has_what_its_loader_asks_for(wide, tmp_path, activation, architecture):
    _, source = wide(activation)
    report = export_powerinfer(source, tmp_path / "a.gguf", "q4_0")
    assert report.architecture == architecture
    with GGUFFile.open(tmp_path / "a.gguf") as file:
        metadata, names = file.metadata, set(file.tensors)
        assert file.magic == b"PWRI" and file.version == 3
        expected = {"token_embd.weight", "output.weight", "output_norm.weight"}
        norms, rest = ("attn", "ffn"), "attn_q attn_k attn_v attn_output ffn_gate ffn_up ffn_down_t fc1 fc2"
        parts = [*(f"{norm}_norm" for norm in norms), *rest.split(" ")]
        assert names == expected | {f"blk.{layer}.{part}.weight" for layer in range(2) for part in parts}
        assert np.array_equal(file.tensors["output.weight"].data, file.tensors["token_embd.weight"].data)
        assert not _read(file, "blk.1.fc1.weight").any() and not _read(file, "blk.1.fc2.weight").any()
        assert file.tensors["blk.0.ffn_down_t.weight"].type == Type.F16  # never F32
    assert metadata["general.architecture"] == architecture
    assert metadata["powerinfer.sparse_threshold"] == 0.0  # every neuron reaches it
    assert metadata[f"{architecture}.feed_forward_length"] == FFN
    assert len(metadata["tokenizer.ggml.tokens"]) == 448  # where its loader takes the size of the vocabulary from
    assert not any(key.startswith("turbosparse.") for key in metadata)


@pytest.mark.parametrize(("quant", "down"), [("q4_0", "Q4_0"), ("q8_0", "F16"), ("f16", "F16")])
def test_the_down_projection_is_in_a_type_that_its_kernel_reads(wide, tmp_path, quant, down):
    folder, source = wide("drelu", quant)
    export_powerinfer(folder, tmp_path / "a.gguf", quant)
    export_powerinfer(source, tmp_path / "b.gguf", "q4_0")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.gguf", "b.gguf"]
    with GGUFFile.open(tmp_path / "a.gguf") as file, GGUFFile.open(tmp_path / "b.gguf") as other:
        assert file.tensors["blk.0.ffn_down_t.weight"].type.name == down
        assert file.tensors["blk.0.ffn_up.weight"].type.name.lower() == quant
        for name, tensor in file.tensors.items():  # a folder and its file become the same
            assert np.array_equal(tensor.data, other.tensors[name].data), name


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_what_comes_back_is_what_went(wide, tmp_path, family):
    _, source = wide("drelu", "f16", family)
    export_powerinfer(source, tmp_path / "a.gguf", "f16")
    import_model(tmp_path / "a.gguf", tmp_path / "b.gguf", None, None)
    first, second = (Engine.load(path, threads=2) for path in (source, tmp_path / "b.gguf"))
    config = replace(second.config, predictor=None)
    assert config == replace(first.config, family="mistral")
    expected = first.session().logits(TOKENS, "exact")
    for mode in second.modes:  # its predictor selects everything
        assert equal_bits(second.session().logits(TOKENS, mode), expected), mode


@pytest.mark.parametrize("quant", ["f32", "f16", "q4_0"])
def test_gates_that_neurons_share_are_written_for_each(wide, tmp_path, quant):
    folder, source = wide("drelu", quant, neurons_per_gate=4)
    export_powerinfer(source, tmp_path / "a.gguf", quant)
    with GGUFFile.open(source) as ours, GGUFFile.open(tmp_path / "a.gguf") as theirs:
        gate, repeated = (file.tensors["blk.1.ffn_gate.weight"] for file in (ours, theirs))
        assert (gate.shape, repeated.shape) == ((FFN // 4, 64), (FFN, 64)) and gate.type == repeated.type
        assert np.array_equal(repeated.data.reshape(FFN, -1), gate.data.reshape(FFN // 4, -1).repeat(4, axis=0))
        assert theirs.metadata["bamboo.feed_forward_length"] == FFN
        assert not any("neurons_per_gate" in key for key in theirs.metadata)
        assert ModelConfig.from_gguf(theirs).neurons_per_gate == 1
    export_powerinfer(folder, tmp_path / "b.gguf", quant)
    assert (tmp_path / "b.gguf").stat().st_size == (tmp_path / "a.gguf").stat().st_size
    if quant == "f16":  # whose down projection stays as it is
        first, second = (Engine.load(path, threads=2) for path in (source, tmp_path / "a.gguf"))
        expected = first.session().logits(TOKENS, "exact")
        for mode in second.modes:
            assert equal_bits(second.session().logits(TOKENS, mode), expected), mode


@pytest.mark.parametrize("quant", ["f32", "f16", "q8_0", "q4_0"])
def test_mirrored_ups_are_written_for_each_neuron_with_its_sign(wide, tmp_path, quant):
    folder, source = wide("drelu", quant, neurons_per_gate=2, mirrored_ups=True)
    export_powerinfer(source, tmp_path / "a.gguf", quant)
    with GGUFFile.open(source) as ours, GGUFFile.open(tmp_path / "a.gguf") as theirs:
        up, written = (file.tensors["blk.1.ffn_up.weight"] for file in (ours, theirs))
        assert (up.shape, written.shape) == ((FFN // 2, 64), (FFN, 64)) and up.type == written.type
        assert np.array_equal(written.data.reshape(FFN, -1)[::2], up.data.reshape(FFN // 2, -1))
        values = _read(theirs, "blk.1.ffn_up.weight")
        assert np.array_equal(values[1::2], -values[::2]) and values.any()
        assert theirs.tensors["blk.1.ffn_gate.weight"].shape == (FFN, 64)
        assert not any("mirrored_ups" in key for key in theirs.metadata)
        assert not ModelConfig.from_gguf(theirs).mirrored_ups
    export_powerinfer(folder, tmp_path / "b.gguf", quant)
    assert (tmp_path / "b.gguf").stat().st_size == (tmp_path / "a.gguf").stat().st_size
    if quant == "f16":  # whose down projection stays as it is
        first, second = (Engine.load(path, threads=2) for path in (source, tmp_path / "a.gguf"))
        expected = first.session().logits(TOKENS, "exact")
        for mode in second.modes:
            assert equal_bits(second.session().logits(TOKENS, mode), expected), mode


def test_mirrored_ups_of_a_type_whose_sign_is_in_more_than_a_scale_are_written_as_floats(wide, tmp_path):
    _, source = wide("drelu", "f16", neurons_per_gate=2, mirrored_ups=True)
    name, writer = "blk.1.ffn_up.weight", GGUFWriter(tmp_path / "q5.gguf", "turbosparse")
    with GGUFFile.open(source) as file:
        copy_metadata(file, writer)
        ups = quants.quantize(_read(file, name), Type.Q5_1)
        copies = [copy_tensor(tensor) for tensor in file.tensors.values()]
    copies = [Copy(name, copy.shape, Type.Q5_1, lambda: iter([ups])) if copy.name == name else copy for copy in copies]
    write_copies(writer, copies, None)
    writer.close()
    export_powerinfer(tmp_path / "q5.gguf", tmp_path / "a.gguf", "f16")
    with GGUFFile.open(tmp_path / "a.gguf") as file:
        assert file.tensors[name].type == Type.F16
        values, stored = _read(file, name), quants.dequantize(ups, Type.Q5_1)
    assert np.array_equal(values[1::2], -values[::2])
    np.testing.assert_allclose(values[::2], stored, rtol=1e-3, atol=1e-6)


def _selected(path, tokens):
    engine = Engine.load(path, compute="f32")
    engine.count_activations()
    engine.session().logits(tokens, "predicted")
    return engine.counters().selected


def test_predictors_of_the_residual_stream_share_a_threshold_by_their_scale(wide, tmp_path):
    _, plain = wide()
    predictor = random_predictor(2, 64, FFN, 32, normed=False)  # thresholds 0.05 and 0.1
    source = add_predictor(plain, tmp_path / "a.gguf", predictor, Type.F32)
    export_powerinfer(source, tmp_path / "b.gguf", "q4_0")
    with GGUFFile.open(tmp_path / "b.gguf") as file:
        assert ModelConfig.from_gguf(file).predictor.thresholds == (np.float32(0.05), np.float32(0.05))
        np.testing.assert_array_equal(_read(file, "blk.0.fc2.weight"), predictor.layers[0][1].astype(np.float32))
        np.testing.assert_allclose(_read(file, "blk.1.fc2.weight"), predictor.layers[1][1] / 2, rtol=1e-6)
    ours, theirs = _selected(source, TOKENS[:20]), _selected(tmp_path / "b.gguf", TOKENS[:20])
    assert ours.any() and np.abs(ours - theirs).sum() <= 1e-3 * ours.sum()  # but for roundings of scores


@pytest.mark.parametrize("threshold", [0.5, -0.5, 0.0])
@pytest.mark.parametrize("outlier", [1.0, 100.0])
def test_predictors_of_the_normed_input_select_the_same_of_the_residual_stream(wide, tmp_path, threshold, outlier):
    _, plain = wide()
    rng = np.random.default_rng(1)
    fc1, fc2 = rng.standard_normal((32, 64)) / 8, rng.standard_normal((FFN, 32)) / 4
    predictor = TinyPredictor([(fc1, fc2, threshold), None], normed=True)
    export_powerinfer(add_predictor(plain, tmp_path / "a.gguf", predictor, Type.F32), tmp_path / "b.gguf", "q4_0")
    r = rng.standard_normal((200, 64)) * rng.uniform(0.1, 10, (200, 1))
    r[:, 7] *= outlier  # a channel far above the others
    rms = np.sqrt((r**2).mean(axis=1, keepdims=True))
    with GGUFFile.open(tmp_path / "b.gguf") as file:
        norm = _read(file, "blk.0.ffn_norm.weight")
        first, second = (_read(file, f"blk.0.{name}.weight") for name in ("fc1", "fc2"))
        assert first.shape == (96, 64) and second.shape == (FFN, 96)
        assert not _read(file, "blk.1.fc2.weight").any()
    scores = np.maximum(r / rms * norm @ fc1.T, 0) @ fc2.T
    theirs = np.maximum(r @ first.T, 0) @ second.T >= 0
    clear = np.abs(scores - threshold) > 4 * 0.14 * abs(threshold) + 1e-4  # four deviations of what stands for rms(r)
    assert clear.mean() > 0.3
    assert np.array_equal(theirs[clear], (scores >= threshold)[clear])


@pytest.mark.parametrize(("thresholds", "without"), [((0.5, -0.5), -1), ((0.5, 0.0), -1), ((0.5, 0.5), 1)])
def test_thresholds_that_cannot_be_one_are_refused(wide, tmp_path, thresholds, without):
    _, plain = wide()
    made = random_predictor(2, 64, FFN, 32, normed=False, without=without)
    layers = [layer and (*layer[:2], t) for layer, t in zip(made.layers, thresholds, strict=True)]
    source = add_predictor(plain, tmp_path / "a.gguf", replace(made, layers=layers), Type.F32)
    with pytest.raises(UserError, match="one for all layers"):
        export_powerinfer(source, tmp_path / "b.gguf", "q4_0")
    assert [file.name for file in tmp_path.iterdir()] == ["a.gguf"]


@pytest.mark.parametrize(
    ("family", "activation", "changes", "named"),
    [
        ("llama", "dense", {}, "activation is swiglu"),
        ("qwen2", "drelu", {}, "qwen2"),
        ("gemma2", "drelu", {}, "gemma2"),
        ("mixtral", "drelu", {}, "mixture of experts"),
        ("llama", "drelu", {"intermediate_size": 992}, "at least 1001 neurons"),
        ("llama", "drelu", {"activation_threshold": [0.1, 0.1]}, "thresholds"),
        ("llama", "drelu", {"head_dim": 32}, "heads of 32"),
        (
            "llama",
            "drelu",
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
    ids=str,
)
def test_what_its_program_does_not_know_stops_the_export(tmp_path, family, activation, changes, named):
    folder = make_folder(tmp_path / "hf", family, activation, **{"intermediate_size": FFN, **changes})
    with pytest.raises(UserError, match=named) as caught:
        export_powerinfer(folder, tmp_path / "a.gguf", "q4_0")
    assert "\n" not in str(caught.value) and ".gguf" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["hf"]
