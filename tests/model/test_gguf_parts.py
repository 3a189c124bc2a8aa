"""A model in several files is the model in one; parts that do not fit together are one sentence."""

import json
import shutil

import gguf
import numpy as np
import pytest
from gguf_files import edit_gguf
from typer.testing import CliRunner

from turbosparse.cli.app import app
from turbosparse.engine import Engine
from turbosparse.errors import UserError
from turbosparse.model.gguf import GGUFFile
from turbosparse.model.gguf_parts import SPLIT_KEYS, part_names, whole_name


@pytest.fixture(scope="module")
def whole(tiny_gguf):
    return tiny_gguf("llama", "drelu", "q8_0")


@pytest.fixture
def parts(whole, tmp_path):
    """Three parts or more, as the `gguf` package writes them."""
    edit_gguf(whole, tmp_path / "m.gguf", split_max_tensors=9)
    found = sorted(tmp_path.glob("m-*.gguf"))
    assert len(found) >= 3
    return found


def _rewrite(path, keys, tensors=None):
    """A part with other keys, or the tensors of another one."""
    reader = gguf.GGUFReader(path)
    values = {key: reader.fields[key].contents() for key in SPLIT_KEYS} | keys
    writer = gguf.GGUFWriter(path.with_suffix(".new"), "llama")
    for key, value in values.items():
        if value is not None:
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for tensor in tensors or reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize("options", [{"split_max_tensors": 5}, {"split_max_tensors": 9, "small_first_shard": True}])
def test_parts_are_the_whole(whole, tmp_path, options):
    edit_gguf(whole, tmp_path / "m.gguf", **options)
    first = tmp_path / part_names(min(file.name for file in tmp_path.iterdir()))[0]
    with GGUFFile.open(whole) as one, GGUFFile.open(first) as several:
        assert several.metadata == one.metadata
        assert several.file_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
        assert set(several.tensors) == set(one.tensors)
        for name, tensor in one.tensors.items():
            found = several.tensors[name]
            assert (found.type, found.shape, found.data.tobytes()) == (tensor.type, tensor.shape, tensor.data.tobytes())
        several.release_pages()


def test_the_engine_reads_all_parts(whole, parts):
    logits = []
    for path in (whole, parts[0]):
        session = Engine.load(path, compute="f32", threads=1).session()
        logits.append(session.prefill([5, 17, 9]))
    assert np.array_equal(*logits)


def test_commands_take_the_first_part(whole, parts, tmp_path):
    shown = [json.loads(CliRunner().invoke(app, ["info", str(path), "--json"]).stdout) for path in (whole, parts[0])]
    assert shown[0]["parameters"] == shown[1]["parameters"]
    folder = tmp_path / "folder"
    done = CliRunner().invoke(app, ["convert", str(parts[0]), str(folder), "--activation", "keep"])
    assert done.exit_code == 0, done.output
    assert (folder / "model.safetensors").is_file()


def test_an_export_does_not_replace_a_part(parts):
    before = parts[1].read_bytes()
    done = CliRunner().invoke(app, ["export", str(parts[0]), str(parts[1]), "--format", "powerinfer"])
    assert done.exit_code == 2 and "belongs to the model that is read" in done.output
    assert parts[1].read_bytes() == before


def test_a_copy_is_whole(parts, tmp_path):
    out = edit_gguf(parts[0], tmp_path / "copy.gguf")
    with GGUFFile.open(out) as file, GGUFFile.open(parts[0]) as several:
        assert set(file.tensors) == set(several.tensors)
        assert not set(SPLIT_KEYS) & set(file.metadata)


def test_a_file_that_is_its_only_part(whole, tmp_path):
    keys = {"split.no": 0, "split.count": 1, "split.tensors.count": 1}
    with GGUFFile.open(edit_gguf(whole, tmp_path / "any name.gguf", keys)) as file, GGUFFile.open(whole) as one:
        assert file.metadata == one.metadata


def _swap(parts):
    other = parts[1].read_bytes()
    shutil.copy(parts[2], parts[1])
    parts[2].write_bytes(other)


def _rename(parts):
    return parts[0].rename(parts[0].with_name("model.gguf"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: p[1], ["part 2 of", "give the first, m-00001-of-"]),
        (lambda p: p[1].unlink(), ["m-00002-of-", "not beside it"]),
        (_rename, ["part 1 of", "end in -00001-of-", "names back"]),
        (_swap, ["m-00002-of-", "says that it is part 3 of", "not 2 of"]),
        (lambda p: _rewrite(p[1], {"split.count": 77}), ["m-00002-of-", "part 2 of 77, not 2 of"]),
        (lambda p: _rewrite(p[1], {"split.no": None, "split.count": None}), ["part 1 of 1, not 2 of"]),
        (lambda p: _rewrite(p[0], {"split.count": 99}), ["part 1 of 99", "names back"]),
        (lambda p: _rewrite(p[0], {"split.count": (1 << 31) - 1}), [f"part 1 of {(1 << 31) - 1}"]),
        (lambda p: _rewrite(p[0], {"split.count": 0}), ["part 0 of 0"]),
        (lambda p: _rewrite(p[0], {"split.no": -1}), ["part -1 of"]),
        (lambda p: _rewrite(p[0], {"split.count": "three"}), ["split.count is three, not a whole number"]),
        (lambda p: _rewrite(p[0], {"split.tensors.count": 12345}), ["names 12345 tensors", "parts hold"]),
        (lambda p: p[1].write_bytes(p[1].read_bytes()[:-100]), ["m-00002-of-", "truncated"]),
        (lambda p: p[1].write_bytes(b"PWRI" + p[1].read_bytes()[4:]), ["m-00002-of-", "PWRI"]),
    ],
)
def test_parts_that_do_not_fit(parts, damage, words):
    changed = damage(parts)
    with pytest.raises(UserError) as caught:
        GGUFFile.open(changed if changed in (parts[1], parts[0].with_name("model.gguf")) else parts[0])
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert message.endswith(".") and "\n" not in message


def test_a_tensor_in_two_parts(parts):
    twice = gguf.GGUFReader(parts[0]).tensors[0]
    _rewrite(parts[1], {}, [twice])
    with pytest.raises(UserError, match=f"{twice.name}.*a part before it has too"):
        GGUFFile.open(parts[0])


@pytest.mark.parametrize(
    ("name", "names", "as_one"),
    [
        ("m.gguf", ["m.gguf"], "m.gguf"),
        ("m-00002-of-00002.gguf", ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"], "m.gguf"),
        ("a/m-00001-of-00001.gguf", ["a/m-00001-of-00001.gguf"], "a/m.gguf"),
        ("m-00003-of-00002.gguf", ["m-00003-of-00002.gguf"], "m.gguf"),
        ("m-1-of-2.gguf", ["m-1-of-2.gguf"], "m-1-of-2.gguf"),
    ],
)
def test_names(name, names, as_one):
    assert part_names(name) == names
    assert whole_name(name) == as_one
