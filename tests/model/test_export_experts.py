"""The experts of a folder in the exported file, however the folder names them."""

import numpy as np
import pytest
from factories import MIXTURES
from folders import copy_folder
from safetensors.numpy import load_file, save_file

from turbosparse.errors import UserError
from turbosparse.model.export import export_gguf
from turbosparse.model.gguf import GGUFFile
from turbosparse.model.quantize import dequantize

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
    folder = copy_folder(tiny_folder("mixtral", activation), tmp_path / f"mixtral-{activation}")
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
    folder = copy_folder(tiny_folder("mixtral"), tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=named):
        export_gguf(folder, tmp_path / "a.gguf", "f32")


@pytest.mark.parametrize("shape", [(4, 192, 64), (5, 191, 64), (5, 192, 32), (960, 64)])
def test_experts_in_one_tensor_of_another_shape_are_refused(tiny_folder, tmp_path, shape):
    folder = copy_folder(tiny_folder("mixtral"), tmp_path / "hf")
    tensors = _fused(load_file(folder / "model.safetensors"))
    tensors["model.layers.0.mlp.experts.gate_up_proj"] = np.zeros(shape, np.float32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match="shape"):
        export_gguf(folder, tmp_path / "a.gguf", "f32")
