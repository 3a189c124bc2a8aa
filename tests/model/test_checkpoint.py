"""Safetensors are read as their own library reads them; a file that lies is one sentence, never a crash or a guess."""

import json
import struct

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from turbosparse.errors import UserError
from turbosparse.model.checkpoint import Checkpoint

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _folder(path, config="{}"):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(config)
    return path


def _raw(path, header, data=b"", length=None):
    """A safetensors file whose header is whatever the test wants."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def _entry(dtype="F32", shape=(2, 2), offsets=(0, 16)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def _refused(folder):
    with pytest.raises(UserError) as caught:
        Checkpoint.open(folder)
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message and len(message) < 500
    return message


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_float_type_is_read_as_torch_reads_it(tmp_path, dtype):
    special = torch.tensor([[0.0, -0.0, float("inf"), float("nan")], [1.0, -2.5, 65504.0, 6e-8]])
    weights = {"a": special.to(DTYPES[dtype]), "b": torch.randn(3, 5, 7).to(DTYPES[dtype]), "c": torch.zeros(0, 4)}
    save_file(weights, _folder(tmp_path / "hf") / "model.safetensors", {"format": "pt"})
    with Checkpoint.open(tmp_path / "hf") as checkpoint:
        assert set(checkpoint.tensors) == set(weights)
        for name, wanted in weights.items():
            found = checkpoint.tensors[name].read()
            assert found.dtype == np.float32 and found.flags.writeable
            np.testing.assert_array_equal(found, wanted.float().numpy())


def test_what_is_read_outlives_the_checkpoint(tmp_path):
    save_file({"a": torch.arange(6.0)}, _folder(tmp_path / "hf") / "model.safetensors")
    with Checkpoint.open(tmp_path / "hf") as checkpoint:
        values = checkpoint.tensors["a"].read()
    np.testing.assert_array_equal(values, np.arange(6))
    assert not checkpoint.tensors


def test_shards_are_one_checkpoint(tiny_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder("qwen3"))
    model.save_pretrained(tmp_path / "hf", max_shard_size="64KB")
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 2
    with Checkpoint.open(tmp_path / "hf") as checkpoint:
        assert checkpoint.config["model_type"] == "qwen3"
        for file in files:
            with safe_open(file, "numpy") as wanted:
                for name in wanted.keys():  # noqa: SIM118
                    np.testing.assert_array_equal(checkpoint.tensors[name].read(), wanted.get_tensor(name))
        assert len(checkpoint.tensors) == len(model.state_dict())
    files[1].unlink()
    assert files[1].name in _refused(tmp_path / "hf")


def test_a_file_of_another_name_is_found_if_it_is_the_only_one(tmp_path):
    save_file({"a": torch.zeros(2)}, _folder(tmp_path / "hf") / "weights.safetensors")
    with Checkpoint.open(tmp_path / "hf") as checkpoint:
        assert list(checkpoint.tensors) == ["a"]
    save_file({"b": torch.zeros(2)}, tmp_path / "hf" / "more.safetensors")
    assert "2 .safetensors files" in _refused(tmp_path / "hf")


def test_integers_are_listed_but_not_read(tmp_path):
    save_file({"ids": torch.arange(4)}, _folder(tmp_path / "hf") / "model.safetensors")
    with Checkpoint.open(tmp_path / "hf") as checkpoint, pytest.raises(UserError, match="I64"):
        checkpoint.tensors["ids"].read()


@pytest.mark.parametrize(
    ("header", "named"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"a": {"dtype": "F32"}, "a": {"dtype": "F32"}}', "twice"),
        ({"a": 1}, "description"),
        ({"a": {}}, "element type"),
        ({"a": _entry(dtype="F4")}, "element type"),
        ({"a": _entry(dtype=["F32"])}, "element type"),
        ({"a": _entry(shape=(2, 3))}, "takes 24"),
        ({"a": _entry(shape=(-2, -2))}, "shape"),
        ({"a": _entry(shape=(2.0, 2.0))}, "shape"),
        ({"a": _entry(shape=(True, 4))}, "shape"),
        ({"a": _entry(shape=(1 << 61, 1 << 61))}, "takes"),
        ({"a": _entry(shape=(1 << 70,))}, "shape"),
        ({"a": _entry(shape=(1,) * 9)}, "shape"),
        ({"a": _entry(shape=(1,) * 1000)}, "shape"),
        ({"a": _entry(offsets=(16, 0))}, "offsets"),
        ({"a": _entry(offsets=(-16, 0))}, "offsets"),
        ({"a": _entry(offsets=(0, 16, 32))}, "offsets"),
        ({"a": _entry(offsets=(24, 40))}, "truncated"),
        ({"a": _entry(offsets=(1 << 61, (1 << 61) + 16))}, "truncated"),
        ({"a": _entry(), "b": _entry(offsets=(8, 24))}, "overlaps"),
        ({"a": _entry(), "b": _entry()}, "overlaps"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_lying_header_is_one_sentence(tmp_path, header, named):
    _raw(_folder(tmp_path / "hf") / "model.safetensors", header, bytes(32))
    assert named in _refused(tmp_path / "hf")


@pytest.mark.parametrize("length", [0, 7, 10**6, (1 << 63) + 1, (1 << 64) - 1])
def test_a_wrong_header_length_is_one_sentence(tmp_path, length):
    _raw(_folder(tmp_path / "hf") / "model.safetensors", {"a": _entry()}, bytes(16), length)
    _refused(tmp_path / "hf")


def test_a_truncated_file_is_one_sentence_wherever_it_ends(tmp_path):
    _folder(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    _raw(file, {"a": _entry()}, bytes(16))
    whole = file.read_bytes()
    for end in range(len(whole)):
        file.write_bytes(whole[:end])
        _refused(tmp_path / "hf")


@pytest.mark.parametrize(
    ("index", "named"),
    [
        ("[]", "JSON object"),
        ("{", "not JSON"),
        ("{}", "weight_map"),
        ('{"weight_map": []}', "weight_map"),
        ('{"weight_map": {"a": "../secret.safetensors"}}', "beside it"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "beside it"),
        ('{"weight_map": {"a": "part.bin"}}', "beside it"),
        ('{"weight_map": {"a": 7}}', "beside it"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "lacks gone"),
        ('{"weight_map": {"missing": "part.safetensors"}}', "no tensor 'missing'"),
        ('{"weight_map": {"a": "part.safetensors", "b": "twin.safetensors"}}', "has too"),
    ],
)
def test_a_lying_index_is_one_sentence(tmp_path, index, named):
    folder = _folder(tmp_path / "hf")
    save_file({"a": torch.zeros(2)}, folder / "part.safetensors")
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, folder / "twin.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    assert named in _refused(folder)


def test_pickles_are_never_loaded(tmp_path):
    torch.save({"a": torch.zeros(2)}, _folder(tmp_path / "hf") / "pytorch_model.bin")
    assert "pickle" in _refused(tmp_path / "hf")


def test_folders_that_are_none(tmp_path):
    assert "does not exist" in _refused(tmp_path / "no")
    (tmp_path / "file").write_text("")
    assert "not a folder" in _refused(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "config.json" in _refused(tmp_path / "empty")
    assert "not JSON" in _refused(_folder(tmp_path / "a", "{"))
    assert "not a JSON object" in _refused(_folder(tmp_path / "b", "[]"))
    assert "model.safetensors" in _refused(_folder(tmp_path / "c"))
    (tmp_path / "c" / "model.safetensors").mkdir()
    _refused(tmp_path / "c")
    (tmp_path / "c" / "model.safetensors").rmdir()
    (tmp_path / "c" / "model.safetensors").write_bytes(b"")
    assert "empty" in _refused(tmp_path / "c")


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4))
def test_flipped_bytes_give_tensors_or_one_sentence(tmp_path, flips):
    folder = _folder(tmp_path / "hf")
    file = folder / "model.safetensors"
    _raw(file, {"a": _entry(), "b": _entry("BF16", (3,), (16, 22)), "c": _entry("F16", (2,), (22, 26))}, bytes(26))
    damaged = bytearray(file.read_bytes())
    for position, value in flips:
        damaged[position % len(damaged)] = value
    file.write_bytes(damaged)
    try:
        with Checkpoint.open(folder) as checkpoint:
            for tensor in checkpoint.tensors.values():
                assert tensor.read().shape == tensor.shape
    except UserError as error:
        assert "\n" not in str(error)
