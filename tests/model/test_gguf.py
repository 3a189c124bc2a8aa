"""GGUF files are read as the `gguf` package reads them; a file that lies is one sentence, never a crash or a hang."""

import json
import re
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from factories import ACTIVATIONS
from gguf import GGMLQuantizationType, GGUFValueType
from gguf_files import edit_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from turbosparse.errors import UserError
from turbosparse.model.config import ModelConfig
from turbosparse.model.gguf import MAGICS, GGUFFile, nbytes_of, row_bytes
from turbosparse.model.quantize import dequantize, quantize

Kind = GGUFValueType
F32 = GGMLQuantizationType.F32


# --- files byte by byte, with whatever in them ---


def _text(value):
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def _key(name, kind, payload):
    return _text(name) + struct.pack("<I", kind) + payload


def _array(kind, count, payload=b""):
    return struct.pack("<IQ", kind, count) + payload


def _info(name="w", dims=(32, 2), kind=int(F32), offset=0, n_dims=None):
    return (
        _text(name)
        + struct.pack("<I", len(dims) if n_dims is None else n_dims)
        + b"".join(struct.pack("<Q", size) for size in dims)
        + struct.pack("<IQ", kind, offset)
    )


def _file(keys=(), infos=(), data=b"", magic=b"GGUF", version=3, n_keys=None, n_tensors=None, alignment=32):
    head = magic + struct.pack(
        "<IQQ", version, len(infos) if n_tensors is None else n_tensors, len(keys) if n_keys is None else n_keys
    )
    head += b"".join(keys) + b"".join(infos)
    return head + bytes(-len(head) % alignment) + data


DATA = bytes(range(256))
U32 = struct.pack("<I", 7)
HUGE = (1 << 64) - 1


def _open(path, content):
    path.write_bytes(content)
    return GGUFFile.open(path)


def _refused(path, content):
    with pytest.raises(UserError) as caught:
        _open(path, content)
    message = str(caught.value)
    assert message.startswith(str(path)) and message.endswith(".") and "\n" not in message and len(message) < 600
    return message


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.gguf"


# --- what is well-formed is read ---


def test_what_the_gguf_package_writes_is_read(path):
    rng = np.random.default_rng(0)
    arrays = {f"t{n}": rng.standard_normal((4, 3, 64)[-n:]).astype(np.float32) for n in (1, 2, 3)}
    kinds = [GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0")]
    values = {
        Kind.UINT8: 200, Kind.INT8: -100, Kind.UINT16: 60_000, Kind.INT16: -30_000, Kind.UINT32: 1 << 31,
        Kind.INT32: -(1 << 31), Kind.FLOAT32: 0.5, Kind.UINT64: 1 << 63, Kind.INT64: -(1 << 63), Kind.FLOAT64: 0.1,
        Kind.BOOL: True, Kind.STRING: "naïve 日本語 \0 end",
    }  # fmt: skip
    lists = {"ints": [1, -2, 3], "floats": [0.5, -0.25], "bools": [True, False], "texts": ["", "a", "ü" * 500]}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    for kind, value in values.items():
        writer.add_key_value(f"x.{kind.name}", value, kind)
    for name, value in lists.items():
        writer.add_array(f"x.{name}", value)
    for name, array in arrays.items():
        for kind in kinds:
            writer.add_tensor(f"{name}.{kind.name}", quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile.open(path) as file:
        for kind, value in values.items():
            assert file.metadata[f"x.{kind.name}"] == value and type(file.metadata[f"x.{kind.name}"]) is type(value)
        assert {name: file.metadata[f"x.{name}"] for name in lists} == lists
        assert (file.version, file.alignment, file.file_bytes) == (3, 64, path.stat().st_size)
        reader = gguf.GGUFReader(path)
        assert [tensor.name for tensor in reader.tensors] == list(file.tensors)
        for theirs in reader.tensors:
            ours = file.tensors[theirs.name]
            assert ours.type == theirs.tensor_type and ours.size == theirs.n_elements
            assert ours.shape == tuple(int(size) for size in theirs.shape)[::-1]
            np.testing.assert_array_equal(ours.data, theirs.data.reshape(-1).view(np.uint8))
            assert not ours.data.flags.writeable
        for name, array in arrays.items():
            tensor = file.tensors[f"{name}.F32"]
            np.testing.assert_array_equal(dequantize(tensor.data, tensor.type, tensor.shape), array)


def test_smallest_files_are_read(path):
    with _open(path, _file()) as file:
        assert file.metadata == {} and file.tensors == {}
    with _open(path, _file(infos=[_info()], data=DATA, version=2)) as file:
        assert file.version == 2 and file.tensors["w"].data.tobytes() == DATA
    with _open(path, _file([_key("s", Kind.STRING, _text(b"\xff\xfe"))])) as file:
        assert file.metadata["s"] == "��"


def test_tensors_may_lie_in_any_order_and_apart(path):
    infos = [_info("b", (32,), offset=192), _info("a", (32,), offset=0)]
    with _open(path, _file(infos=infos, data=bytes(192) + DATA)) as file:
        assert list(file.tensors) == ["b", "a"]
        assert file.tensors["b"].data.tobytes() == DATA[:128]


def test_a_view_outlives_the_file(path):
    with _open(path, _file(infos=[_info()], data=DATA)) as file:
        view = file.tensors["w"].data
    assert view.tobytes() == DATA and not file.tensors


def test_sizes_of_rows():
    assert row_bytes(GGMLQuantizationType.Q4_0, 64) == 36
    assert nbytes_of(GGMLQuantizationType.Q8_0, (3, 5, 32)) == 15 * 34
    with pytest.raises(ValueError, match="blocks of 32"):
        row_bytes(GGMLQuantizationType.Q4_0, 33)


# --- what cannot be true is one sentence ---

BAD = {
    "no magic": (_file(magic=b"GGML"), "GGML"),
    "text": (b"Hello, this is no model at all, only some text.", "Hell"),
    "too short": (b"GG", "magic|the file ends"),
    "magic alone": (b"GGUF", "version"),
    "version 1": (_file(version=1), "version is 1"),
    "version 4": (_file(version=4), "version is 4"),
    "big endian": (_file(version=3 << 24), "big-endian"),
    "more tensors than bytes": (_file(n_tensors=1 << 40), "tensors"),
    "tensor count that wraps": (_file(n_tensors=HUGE), "tensors"),
    "more keys than bytes": (_file(n_keys=1 << 40), "keys"),
    "key count that wraps": (_file(n_keys=HUGE), "keys"),
    "one key too many": (_file([_key("a", Kind.UINT32, U32)], n_keys=2), "not a usable"),
    "one tensor too many": (_file(infos=[_info()], data=DATA, n_tensors=2), "not a usable"),
    "an empty key": (_file([_key("", Kind.UINT32, U32)]), "name"),
    "a key of 64 KiB": (_file([_key("k" * 65536, Kind.UINT32, U32)]), "65536 bytes"),
    "a key that is not UTF-8": (_file([_key(b"\xff", Kind.UINT32, U32)]), "UTF-8"),
    "a key that ends nowhere": (_file([struct.pack("<Q", HUGE) + b"abcdefgh"]), "name of key 0"),
    "a key twice": (_file([_key("a", Kind.UINT32, U32)] * 2), "'a' appears twice"),
    "an unknown value type": (_file([_key("a", 13, U32)]), "value type 13"),
    "a huge value type": (_file([_key("a", 0xFFFFFFFF, U32)]), "value type"),
    "a huge string": (_file([_key("a", Kind.STRING, struct.pack("<Q", 1 << 62) + b"text")]), "'a' needs"),
    "a string length that wraps": (_file([_key("a", Kind.STRING, struct.pack("<Q", HUGE))]), "'a' needs"),
    "a boolean of 2": (_file([_key("a", Kind.BOOL, b"\2")]), "boolean"),
    "booleans of 2": (_file([_key("a", Kind.ARRAY, _array(Kind.BOOL, 2, b"\1\2"))]), "boolean"),
    "nested arrays": (_file([_key("a", Kind.ARRAY, _array(Kind.ARRAY, 1, _array(Kind.UINT8, 1, b"\1")))]), "arrays"),
    "deeply nested arrays": (_file([_key("a", Kind.ARRAY, _array(Kind.ARRAY, 1) * 10_000)]), "array of arrays"),
    "a huge array": (_file([_key("a", Kind.ARRAY, _array(Kind.FLOAT32, 1 << 60))]), "entries"),
    "an array count that wraps": (_file([_key("a", Kind.ARRAY, _array(Kind.UINT64, 1 << 61))]), "entries"),
    "a huge array of strings": (_file([_key("a", Kind.ARRAY, _array(Kind.STRING, HUGE))]), "entries"),
    "strings past the end": (
        _file([_key("a", Kind.ARRAY, _array(Kind.STRING, 2, _text("a") + struct.pack("<Q", HUGE)))]),
        "longer than",
    ),
    "an array of an unknown type": (_file([_key("a", Kind.ARRAY, _array(99, 1, U32))]), "value type 99"),
    "alignment 0": (_file([_key("general.alignment", Kind.UINT32, struct.pack("<I", 0))]), "alignment is 0"),
    "alignment 48": (_file([_key("general.alignment", Kind.UINT32, struct.pack("<I", 48))]), "alignment is 48"),
    "alignment 2^31": (_file([_key("general.alignment", Kind.UINT32, struct.pack("<I", 1 << 31))]), "alignment"),
    "alignment true": (_file([_key("general.alignment", Kind.BOOL, b"\1")]), "alignment"),
    "alignment in words": (_file([_key("general.alignment", Kind.STRING, _text("32"))]), "alignment"),
    "alignments": (_file([_key("general.alignment", Kind.ARRAY, _array(Kind.UINT32, 1, U32))]), "alignment"),
    "an empty tensor name": (_file(infos=[_info("")], data=DATA), "name of tensor 0"),
    "no dimensions": (_file(infos=[_info(dims=())], data=DATA), "0 dimensions"),
    "five dimensions": (_file(infos=[_info(dims=(1,) * 5)], data=DATA), "5 dimensions"),
    "four billion dimensions": (_file(infos=[_info(n_dims=0xFFFFFFFF)], data=DATA), "dimensions"),
    "a dimension of zero": (_file(infos=[_info(dims=(32, 0))], data=DATA), "dimension of zero"),
    "zero beside huge": (_file(infos=[_info(dims=(0, HUGE))], data=DATA), "dimension of zero"),
    "sizes that wrap to 0": (_file(infos=[_info(dims=(1 << 32, 1 << 32))], data=DATA), "ends at byte"),
    "sizes that wrap to 256": (_file(infos=[_info(dims=(64, (1 << 58) + 1))], data=DATA), "ends at byte"),
    "larger than the file": (_file(infos=[_info(dims=(32, 3))], data=DATA), "ends at byte"),
    "an unknown tensor type": (_file(infos=[_info(kind=4)], data=DATA), "tensor type 4"),
    "a huge tensor type": (_file(infos=[_info(kind=0xFFFFFFFF)], data=DATA), "tensor type"),
    "half a block": (_file(infos=[_info(dims=(33,), kind=2)], data=DATA), "blocks of 32"),
    "an odd offset": (_file(infos=[_info(dims=(8,), offset=8)], data=DATA), "multiple of the alignment"),
    "an offset past the end": (_file(infos=[_info(offset=1 << 40)], data=DATA), "ends at byte"),
    "an offset that wraps": (_file(infos=[_info(offset=(1 << 64) - 32)], data=DATA), "ends at byte"),
    "a tensor twice": (_file(infos=[_info(dims=(8,)), _info(dims=(8,), offset=32)], data=DATA), "appears twice"),
    "overlapping tensors": (_file(infos=[_info("a"), _info("b", (8,), offset=224)], data=DATA), "overlaps"),
    "the same bytes twice": (_file(infos=[_info("a"), _info("b")], data=DATA), "overlaps"),
    "a name full of escapes": (_file(infos=[_info("\x1b[2J\n\r", (0,))], data=DATA), r"\\x1b"),
}


@pytest.mark.parametrize("magic", sorted(MAGICS))
@pytest.mark.parametrize("case", BAD)
def test_a_lie_is_one_sentence(path, case, magic):
    content, named = BAD[case]
    content = content.replace(b"GGUF", magic, 1)
    message = _refused(path, content)
    assert "\x1b" not in message
    assert re.search(named, message), message


def test_too_many_array_entries_are_refused_before_they_are_built(path, monkeypatch):
    monkeypatch.setattr("turbosparse.model.gguf.MAX_ARRAY_ENTRIES", 10)
    keys = [_key(name, Kind.ARRAY, _array(Kind.UINT8, 6, bytes(6))) for name in "ab"]
    assert "12 entries" in _refused(path, _file(keys))


def test_places_without_a_file(tmp_path, path):
    for place, named in (
        (tmp_path / "no.gguf", "cannot be read"),
        (tmp_path, "folder"),
        (Path("/dev/null"), "regular"),
    ):
        with pytest.raises(UserError, match=named):
            GGUFFile.open(place)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="empty"):
        GGUFFile.open(path)
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(UserError, match="cannot be read"):
        GGUFFile.open(path)


def test_a_truncated_model_is_refused_wherever_it_ends(tiny_gguf, path):
    whole = tiny_gguf("llama", "drelu", "q4_0").read_bytes()
    with _open(path, whole) as file:
        last = max(file.tensors.values(), key=lambda tensor: tensor.data.ctypes.data)
        header = min(tensor.data.ctypes.data for tensor in file.tensors.values())
        start = len(whole) - (last.data.ctypes.data + last.data.nbytes - header)
        padding = -last.data.nbytes % 32
        del last
    ends = {*range(0, start, max(1, start // 400)), start, start + 1, len(whole) - padding - 1}
    for end in sorted(ends):
        path.write_bytes(whole[:end])
        with pytest.raises(UserError):
            GGUFFile.open(path)


# --- models whose metadata and tensors disagree ---


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"keys": {"turbosparse.format_version": 6}}, "format version is 6"),
        ({"keys": {"turbosparse.gate_threshold": -0.5}}, "gate_threshold"),
        ({"keys": {"turbosparse.gate_threshold": float("inf")}}, "gate_threshold"),
        ({"keys": {"turbosparse.activation_threshold": [0.5]}}, "activation_threshold is not a list of"),
        ({"keys": {"turbosparse.activation_threshold": [0.5, -1.0]}}, "not from 0 to"),
        ({"keys": {"turbosparse.activation_threshold": [0.5, float("nan")]}}, "activation_threshold is not a list of"),
        ({"keys": {"turbosparse.base": "gpt2"}}, "gpt2"),
        ({"keys": {"turbosparse.base": None}}, "turbosparse.base"),
        ({"keys": {"turbosparse.activation": "swiglu"}}, "drelu or reglu"),
        ({"keys": {"turbosparse.activation": None}}, "activation"),
        ({"keys": {"general.architecture": "bert"}}, "bert"),
        ({"keys": {"turbosparse.block_count": 3}}, "blk.2"),
        ({"keys": {"turbosparse.block_count": 1}}, "blk.1"),
        ({"keys": {"turbosparse.block_count": 1 << 40}}, "block_count"),
        ({"keys": {"turbosparse.embedding_length": 0}}, "embedding_length"),
        ({"keys": {"turbosparse.embedding_length": 96}}, "shape"),
        ({"keys": {"turbosparse.feed_forward_length": 64}}, "shape"),
        ({"keys": {"turbosparse.feed_forward_length": "96"}}, "feed_forward_length"),
        ({"keys": {"turbosparse.attention.head_count": 3}}, "evenly"),
        ({"keys": {"turbosparse.attention.head_count_kv": None}}, "shape"),
        ({"keys": {"turbosparse.attention.key_length": 32}}, "head size"),
        ({"keys": {"turbosparse.expert_count": 8}}, "mixture of experts"),
        ({"keys": {"turbosparse.rope.scaling.type": "yarn"}}, "yarn"),
        ({"keys": {"tokenizer.ggml.tokens": ["a"] * 447}}, "447 tokens .* 448 rows"),
        ({"keys": {"tokenizer.ggml.tokens": ["a"] * 449}}, "449 tokens .* 448 rows"),
        ({"drop": ["blk.1.ffn_down_t.weight"]}, "ffn_down_t"),
        ({"drop": ["token_embd.weight"]}, "token_embd"),
        ({"tensors": {"blk.0.ffn_up.bias": np.zeros(96, np.float32)}}, "ffn_up.bias"),
        ({"tensors": {"rope_freqs.weight": np.ones(5, np.float32)}}, "rope_freqs"),
        ({"tensors": {"blk.0.ffn_up.weight": np.zeros((64, 96), np.float32)}}, "shape"),
    ],
    ids=lambda case: str(case)[:60],
)
def test_a_model_that_contradicts_itself_is_refused(tiny_gguf, path, changes, named):
    edit_gguf(tiny_gguf("llama", "drelu"), path, **changes)
    with GGUFFile.open(path) as file, pytest.raises(UserError, match=named) as caught:
        ModelConfig.from_gguf(file)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


_GATES = "blk.1.ffn_gate_exps.weight"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"keys": {"expert_count": 0}}, "expert_count"),
        ({"keys": {"expert_count": None}}, "expert_count"),
        ({"keys": {"expert_count": 4}}, "shape"),
        ({"keys": {"expert_count": 1025}}, "expert_count"),
        ({"keys": {"expert_count": 0xFFFFFFFF}}, "expert_count"),
        ({"keys": {"expert_count": "5"}}, "expert_count"),
        ({"keys": {"expert_used_count": 0}}, "expert_used_count"),
        ({"keys": {"expert_used_count": None}}, "expert_used_count"),
        ({"keys": {"expert_used_count": 6}}, "expert_used_count"),
        ({"keys": {"expert_feed_forward_length": 64}}, "shape"),
        ({"keys": {"base": "llama"}}, "a llama model that is a mixture of experts"),
        ({"drop": [_GATES]}, _GATES),
        ({"drop": ["blk.1.ffn_gate_inp.weight"]}, "blk.1.ffn_gate_inp"),
        ({"tensors": {"blk.1.ffn_gate.weight": np.zeros((96, 64), np.float32)}}, "blk.1.ffn_gate.weight"),
        ({"tensors": {_GATES: np.zeros((5 * 96, 64), np.float32)}}, "shape"),
        ({"tensors": {_GATES: np.zeros((5, 64, 96), np.float32)}}, "shape"),
        ({"tensors": {_GATES: np.zeros((5, 96, 1, 64), np.float32)}}, "shape"),
        ({"tensors": {_GATES: np.zeros(5 * 96 * 64, np.float32)}}, "shape"),
        ({"tensors": {"blk.1.ffn_gate_inp.weight": np.zeros((6, 64), np.float32)}}, "shape"),
    ],
    ids=str,
)
def test_a_mixture_that_contradicts_itself_is_refused(tiny_gguf, path, changes, named):
    keys = {f"turbosparse.{key}": value for key, value in changes.get("keys", {}).items()}
    edit_gguf(tiny_gguf("mixtral", "drelu"), path, **(changes | {"keys": keys}))
    with GGUFFile.open(path) as file, pytest.raises(UserError, match=named) as caught:
        ModelConfig.from_gguf(file)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


# --- fuzz ---


def _survives(path, content):
    """A mutation gives a file and a description, or one sentence; nothing else."""
    path.write_bytes(content)
    try:
        with GGUFFile.open(path) as file:
            for tensor in file.tensors.values():
                assert tensor.data.nbytes == nbytes_of(tensor.type, tensor.shape)
            config = ModelConfig.from_gguf(file)
            assert config.n_layers >= 1
            json.dumps(config.__dict__)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000


def _small(tiny_gguf, family, activation):
    """Header and metadata without the vocabulary, so that flips hit what matters; and where the tensors start."""
    target = tiny_gguf(family, activation).with_suffix(".small")
    if not target.exists():
        keys = ("tokens", "merges", "token_type")
        edit_gguf(tiny_gguf(family, activation), target, keys={f"tokenizer.ggml.{key}": None for key in keys})
    content = target.read_bytes()
    with GGUFFile.open(target) as file:
        sizes = sum(-(-tensor.data.nbytes // 32) * 32 for tensor in file.tensors.values())
    return content, len(content) - sizes


_FUZZ = settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
_INTERESTING = st.sampled_from([0, 1, 2, 7, 31, 127, 128, 255]) | st.integers(0, 255)


@pytest.mark.parametrize("activation", ACTIVATIONS[:2])
@_FUZZ
@given(data=st.data())
def test_flipped_bytes_of_the_header(tiny_gguf, path, activation, data):
    content, start = _small(tiny_gguf, "gemma3" if activation == "dense" else "llama", activation)
    damaged = bytearray(content)
    for position, value in data.draw(
        st.lists(st.tuples(st.integers(0, start - 1), _INTERESTING), min_size=1, max_size=5)
    ):
        damaged[position] = value
    _survives(path, damaged)


@_FUZZ
@given(data=st.data())
def test_counts_and_sizes_replaced_by_hostile_ones(tiny_gguf, path, data):
    content, start = _small(tiny_gguf, data.draw(st.sampled_from(["qwen2", "mixtral"])), "drelu")
    damaged = bytearray(content)
    position = data.draw(st.integers(0, start - 8))
    hostile = st.sampled_from([0, 1, 1 << 31, 1 << 32, 1 << 61, 1 << 63, HUGE]) | st.integers(0, HUGE)
    damaged[position : position + 8] = struct.pack("<Q", data.draw(hostile))
    _survives(path, damaged)


@_FUZZ
@given(data=st.data())
def test_bytes_cut_out_or_put_in(tiny_gguf, path, data):
    content, start = _small(tiny_gguf, "llama", "reglu")
    first, second = (data.draw(st.integers(0, start)) for _ in range(2))
    _survives(path, content[:first] + data.draw(st.binary(max_size=40)) + content[second:])


@pytest.mark.parametrize("magic", sorted(MAGICS))
@_FUZZ
@given(content=st.binary(max_size=400))
def test_random_bytes_behind_a_magic(path, magic, content):
    _survives(path, magic + struct.pack("<I", 3) + content)
