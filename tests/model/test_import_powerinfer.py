"""A file of PowerInfer is the model that it would be in our format, and becomes it; what it cannot be is refused."""

import struct
from dataclasses import replace

import numpy as np
import pytest
from agreement import TOKENS, equal_bits
from factories import add_predictor, random_predictor
from gguf import GGMLQuantizationType as Type
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from powerinfer_files import write_powerinfer

from turbosparse.engine import Engine
from turbosparse.errors import UserError
from turbosparse.model.config import ModelConfig, Predictor
from turbosparse.model.export_powerinfer import export_powerinfer
from turbosparse.model.gguf import GGUFFile
from turbosparse.model.import_powerinfer import import_model

THRESHOLD = 0.125
# Architecture, and the family and activation that it stands for.
KINDS = [("bamboo", "mistral", "drelu"), ("llama", "llama", "reglu")]


def _predictor():
    made = random_predictor(2, 64, 96, 32, normed=False)
    return replace(made, layers=[(fc1, fc2, THRESHOLD) for fc1, fc2, _ in made.layers])


@pytest.fixture(scope="module")
def pair(tiny_gguf, tmp_path_factory):
    """pair(architecture, family, activation) -> a file of PowerInfer, and the same model in our format."""

    def make(architecture, family, activation):
        folder = tmp_path_factory.mktemp("powerinfer")
        source = tiny_gguf(family, activation)
        theirs = write_powerinfer(
            source, folder / "theirs.gguf", architecture, _predictor(), {"powerinfer.sparse_threshold": THRESHOLD}
        )
        return theirs, add_predictor(source, folder / "ours.gguf", _predictor(), Type.F32)

    return make


def _config(path):
    with GGUFFile.open(path) as file:
        return ModelConfig.from_gguf(file)


def _same_logits(a, b):
    first, second = (Engine.load(path, compute="f32", threads=2) for path in (a, b))
    assert first.modes == second.modes == ("dense", "exact", "predicted")
    for mode in first.modes:
        assert equal_bits(first.session().logits(TOKENS, mode), second.session().logits(TOKENS, mode)), mode


@pytest.mark.parametrize("kind", KINDS)
def test_it_runs_as_the_same_weights_in_our_format_do(pair, kind):
    theirs, ours = pair(*kind)
    config = _config(theirs)
    assert (config.family, config.activation) == kind[1:]
    assert config.predictor == Predictor((32, 32), (THRESHOLD, THRESHOLD), "residual")
    _same_logits(theirs, ours)


@pytest.mark.parametrize("kind", KINDS)
def test_an_imported_file_is_one_of_ours(pair, kind, tmp_path):
    theirs, ours = pair(*kind)
    report = import_model(theirs, tmp_path / "a.gguf", None, None)
    assert (report.architecture, report.quant) == ("turbosparse", "f32")
    assert report.file_bytes == (tmp_path / "a.gguf").stat().st_size
    with GGUFFile.open(tmp_path / "a.gguf") as file, GGUFFile.open(ours) as expected:
        assert file.magic == b"GGUF"
        assert set(file.tensors) == set(expected.tensors)  # a tied output is not there twice
        assert report.parameters == sum(tensor.size for tensor in file.tensors.values())
        for name, tensor in file.tensors.items():
            assert np.array_equal(tensor.data, expected.tensors[name].data), name
        for key in expected.metadata:
            if key.startswith("tokenizer."):
                assert file.record(key) == expected.record(key)
    _same_logits(tmp_path / "a.gguf", ours)


def test_a_threshold_can_be_given_and_is_zero_where_none_is_stated(tiny_gguf, tmp_path):
    theirs = write_powerinfer(tiny_gguf("mistral", "drelu"), tmp_path / "a.gguf", "bamboo", _predictor())
    assert _config(theirs).predictor.thresholds == (0.0, 0.0)
    import_model(theirs, tmp_path / "b.gguf", None, 0.5)
    assert _config(tmp_path / "b.gguf").predictor.thresholds == (0.5, 0.5)


def test_a_folder_with_one_file_stands_for_it(pair, tmp_path):
    theirs, _ = pair(*KINDS[0])
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match=r"neither .* nor one GGUF file"):
        import_model(tmp_path / "model", tmp_path / "a.gguf", None, None)
    (tmp_path / "model" / "x.gguf").write_bytes(theirs.read_bytes())
    import_model(tmp_path / "model", tmp_path / "a.gguf", None, None)
    assert _config(tmp_path / "a.gguf").activation == "drelu"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"keys": {"powerinfer.sparse_threshold": float("nan")}}, "sparse_threshold"),
        ({"keys": {"powerinfer.sparse_threshold": "0.5"}}, "sparse_threshold"),
        ({"keys": {"powerinfer.sparse_threshold": [0.5, 0.5]}}, "sparse_threshold"),
        ({"keys": {"bamboo.block_count": 1 << 31}}, "block_count"),
        ({"keys": {"bamboo.block_count": 3}}, r"blk\.2\.fc1"),
        ({"keys": {"bamboo.feed_forward_length": None}}, "feed_forward_length"),
        ({"keys": {"bamboo.attention.head_count": 0}}, "head_count"),
        ({"tensors": {"blk.1.fc1.weight": None}}, r"blk\.1\.fc1"),
        ({"tensors": {"blk.1.fc1.weight": np.zeros(64)}}, r"blk\.1\.fc1"),
        ({"tensors": {"blk.1.fc1.weight": np.zeros((1 << 18, 1))}}, r"blk\.1\.fc1"),
        ({"tensors": {"blk.1.fc1.weight": np.zeros((32, 32))}}, "shape"),
        ({"tensors": {"blk.1.fc2.weight": None}}, r"blk\.1\.fc2"),
        ({"tensors": {"blk.1.fc2.weight": np.zeros((96, 33))}}, "shape"),
        ({"tensors": {"blk.0.ffn_down_t.weight": None}}, "ffn_down_t"),
        ({"tensors": {"blk.0.ffn_up.bias": np.zeros(96)}}, r"ffn_up\.bias"),
    ],
    ids=str,
)
def test_a_file_that_contradicts_itself_is_refused(tiny_gguf, tmp_path, changes, named):
    theirs = write_powerinfer(tiny_gguf("mistral", "drelu"), tmp_path / "a.gguf", "bamboo", _predictor(), **changes)
    with pytest.raises(UserError, match=named) as caught:
        import_model(theirs, tmp_path / "b.gguf", None, None)
    assert str(caught.value).startswith(str(theirs)) and "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["a.gguf"]


@pytest.mark.parametrize("architecture", ["opt", "falcon", "turbosparse", "qwen2"])
def test_other_architectures_are_refused(tiny_gguf, tmp_path, architecture):
    theirs = write_powerinfer(tiny_gguf("mistral", "drelu"), tmp_path / "a.gguf", architecture, _predictor())
    with pytest.raises(UserError, match=f"{architecture}.*bamboo, llama are"):
        import_model(theirs, tmp_path / "b.gguf", None, None)


def test_what_is_no_file_of_powerinfer_is_not_imported(tiny_gguf, pair, tmp_path):
    with pytest.raises(UserError, match="begins with PWRI"):
        import_model(tiny_gguf("llama"), tmp_path / "b.gguf", None, None)
    with pytest.raises(UserError, match="--quant q8_0"):
        import_model(pair(*KINDS[0])[0], tmp_path / "b.gguf", "q8_0", None)
    theirs = pair(*KINDS[0])[0]
    with pytest.raises(UserError, match="belongs to the model that is read"):
        import_model(theirs, theirs, None, None)
    with pytest.raises(UserError, match="PowerInfer file already"):
        export_powerinfer(pair(*KINDS[0])[0], tmp_path / "b.gguf", "q4_0")
    assert not list(tmp_path.iterdir())


# --- hostile files ---


@pytest.fixture(scope="module")
def small(tiny_gguf, tmp_path_factory):
    """A whole file without its vocabulary, so that damage hits what matters; and where its tensors start."""
    path = tmp_path_factory.mktemp("small") / "a.gguf"
    keys = {f"tokenizer.ggml.{key}": None for key in ("tokens", "merges", "token_type")}
    keys["powerinfer.sparse_threshold"] = THRESHOLD
    content = write_powerinfer(tiny_gguf("mistral", "drelu"), path, "bamboo", _predictor(), keys).read_bytes()
    with GGUFFile.open(path) as file:
        sizes = sum(-(-tensor.data.nbytes // 32) * 32 for tensor in file.tensors.values())
    return path, content, len(content) - sizes


def _survives(path, content):
    """It is a model or one sentence; nothing else."""
    path.write_bytes(content)
    try:
        with GGUFFile.open(path) as file:
            assert ModelConfig.from_gguf(file).n_layers >= 1
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000


_FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_a_file_that_ends_early_is_refused(small):
    path, whole, start = small
    for end in {*range(0, start, max(1, start // 300)), start, start + 1, len(whole) - 1}:
        path.write_bytes(whole[:end])
        with pytest.raises(UserError):
            GGUFFile.open(path)


@_FUZZ
@given(data=st.data())
def test_flipped_bytes(small, data):
    path, content, start = small
    damaged = bytearray(content)
    for position, value in data.draw(
        st.lists(st.tuples(st.integers(0, start - 1), st.integers(0, 255)), min_size=1, max_size=5)
    ):
        damaged[position] = value
    _survives(path, damaged)


@_FUZZ
@given(data=st.data())
def test_counts_and_sizes_replaced_by_hostile_ones(small, data):
    path, content, start = small
    damaged = bytearray(content)
    position = data.draw(st.integers(0, start - 8))
    hostile = st.sampled_from([0, 1, 1 << 31, 1 << 32, 1 << 61, 1 << 63, (1 << 64) - 1]) | st.integers(0, (1 << 64) - 1)
    damaged[position : position + 8] = struct.pack("<Q", data.draw(hostile))
    _survives(path, damaged)
