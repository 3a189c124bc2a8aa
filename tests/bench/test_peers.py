"""Other engines as contestants. transformers is always there for tests; llama.cpp in make test-models."""

import pytest

from turbosparse.bench.peers import PEERS, Peer
from turbosparse.bench.twin import dense_twin_of
from turbosparse.cli.bench import Against
from turbosparse.engine import Engine
from turbosparse.errors import UserError
from turbosparse.model.config import ModelConfig
from turbosparse.model.gguf import GGUFFile
from turbosparse.model.shapes import shape_config
from turbosparse.model.synthetic import rates_for, write_synthetic


def test_the_option_offers_every_peer():
    assert tuple(Against) == PEERS


def test_a_peer_is_timed_in_a_process_of_its_own(tiny_gguf):
    peer = Peer("transformers", tiny_gguf("llama"), 1, 64)
    try:
        for _ in range(2):  # the second pass starts anew
            sample = peer.measure([3, 4, 5], 4)
            assert (sample.prompt_tokens, sample.decode_tokens) == (3, 4)
            assert sample.prefill_seconds > 0 and sample.decode_seconds > 0
            assert sample.bytes_read is None
        peer._process.kill()
        peer._process.join()
        with pytest.raises(UserError, match="stopped in the middle"):
            peer.measure([3, 4, 5], 4)
    finally:
        peer.close()


def test_a_peer_that_cannot_run_the_file_says_so(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="transformers cannot run"):
        Peer("transformers", tmp_path / "broken.gguf", 1, 64)


@pytest.mark.models
def test_llama_cpp_is_timed_on_a_synthetic_twin(tmp_path):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra bench)")
    path = tmp_path / "twin.gguf"
    write_synthetic(path, "m", shape_config("smollm2-135m", "swiglu", 2), rates_for(0.9, 0.25), "q4_0")
    peer = Peer("llama.cpp", path, 1, 64)
    try:
        assert peer.measure([3, 4, 5], 4).decode_seconds > 0
    finally:
        peer.close()


@pytest.mark.parametrize(("group", "mirrored"), [(1, False), (2, False), (2, True)])
def test_a_synthetic_model_gets_a_twin_of_its_shape(tmp_path, group, mirrored):
    path = tmp_path / "model.gguf"
    config = shape_config("smollm2-135m", "drelu", 1, group, mirrored)
    write_synthetic(path, "m", config, rates_for(0.9, None, mirrored), "q4_0")
    engine = Engine.load(path)
    with dense_twin_of(str(path), engine, None, needed=True) as twin:
        assert twin is not None
        with GGUFFile.open(twin) as file:
            config = ModelConfig.from_gguf(file)
        assert (config.activation, config.ffn_size) == ("swiglu", engine.config.ffn_size)
    assert not twin.exists()
    with dense_twin_of(str(path), engine, None, needed=False) as none:
        assert none is None


def test_a_real_sparse_model_has_no_twin_of_its_own(tiny_gguf):
    path = tiny_gguf("llama", "drelu")
    with (
        pytest.raises(UserError, match="--dense-twin"),
        dense_twin_of(str(path), Engine.load(path), None, needed=True),
    ):
        pass


def test_a_dense_model_is_its_own_twin(tiny_gguf):
    path = tiny_gguf("llama")
    with dense_twin_of(str(path), Engine.load(path), None, needed=True) as twin:
        assert twin == path
