import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from turbosparse.errors import UserError
from turbosparse.relufy.data import Mixture, build_mixture, tokenize, validation_windows
from turbosparse.relufy.recipes import TextSource


@pytest.fixture(scope="module")
def tokenizer():
    words = {"<eos>": 0, "<unk>": 1} | {f"w{i}": i + 2 for i in range(50)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", unk_token="<unk>")


def _source(tmp_path, name, documents, **options):
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return TextSource(domain=name, path=str(path), **options)


def test_tokens_are_documents_joined_by_eos_and_cached_by_content(tmp_path, tokenizer):
    source = _source(tmp_path, "a", ["w0 w1", "w2"])
    tokens = tokenize(source, tokenizer, tmp_path / "cache")
    assert tokens.tolist() == [2, 3, 0, 4, 0]
    assert tokens.dtype == np.uint16
    (cached,) = (tmp_path / "cache").iterdir()
    cached.write_bytes(np.array([7], np.uint16).tobytes())
    assert tokenize(source, tokenizer, tmp_path / "cache").tolist() == [7]  # the cache is used
    changed = _source(tmp_path, "a", ["w0 w3", "w2"])
    assert tokenize(changed, tokenizer, tmp_path / "cache").tolist() == [2, 5, 0, 4, 0]
    limited = _source(tmp_path, "a", ["w0 w3", "w2"], max_tokens=4)
    assert tokenize(limited, tokenizer, tmp_path / "cache").tolist() == [2, 5, 0, 4]


def test_a_tokenizer_that_truncates_and_pads_does_neither_here(tmp_path, tokenizer):
    texts = ["w0 w1 w2 w3", "w4"]
    expected = tokenize(_source(tmp_path, "a", texts), tokenizer, tmp_path / "cache").tolist()
    tokenizer.save_pretrained(tmp_path / "saved")
    cutting = Tokenizer.from_file(str(tmp_path / "saved" / "tokenizer.json"))
    cutting.enable_truncation(2)  # as a fine-tuning leaves it
    cutting.enable_padding(length=2)
    cutting.save(str(tmp_path / "saved" / "tokenizer.json"))
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")
    assert loaded.backend_tokenizer.truncation is not None
    assert tokenize(_source(tmp_path, "a", texts), loaded, tmp_path / "other").tolist() == expected


def test_nothing_half_written_stays(tmp_path, tokenizer):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "w0"}\nnot json\n')
    with pytest.raises(UserError, match=r"bad\.jsonl"):
        tokenize(TextSource(domain="bad", path=str(path)), tokenizer, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("path", ["none*.jsonl", "empty.jsonl"])
def test_missing_and_empty_sources(tmp_path, tokenizer, path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError):
        tokenize(TextSource(domain="x", path=str(tmp_path / path)), tokenizer, tmp_path / "cache")


def _mixture(n_samples, seed=3, sizes=(400, 901)):
    sources = [np.arange(size, dtype=np.uint16) + 1000 * i for i, size in enumerate(sizes)]
    return Mixture(sources, [3.0, 1.0], context=10, n_samples=n_samples, seed=seed)


def test_a_sample_depends_on_the_seed_and_its_index_alone():
    whole, again = _mixture(500), _mixture(500)
    backwards = [again[i]["input_ids"].tolist() for i in reversed(range(500))][::-1]
    assert [whole[i]["input_ids"].tolist() for i in range(500)] == backwards
    other = _mixture(500, seed=4)
    assert any(other[i]["input_ids"].tolist() != backwards[i] for i in range(20))


def test_weights_epochs_and_windows():
    mixture = _mixture(2000)
    domains = [mixture[i]["domain"] for i in range(2000)]
    assert np.mean(np.array(domains) == 0) == pytest.approx(0.75, abs=0.03)
    first = [mixture[i]["input_ids"].numpy() for i in range(2000) if domains[i] == 0]
    assert all((np.diff(ids) == 1).all() for ids in first)  # whole windows, in text order inside
    per_epoch = 400 // 10 - 1
    for epoch in range(3):
        starts = sorted(int(ids[0]) for ids in first[epoch * per_epoch : (epoch + 1) * per_epoch])
        assert (np.diff(starts) == 10).all()  # every window once, side by side
    assert first[0][0] % 10 != first[per_epoch][0] % 10 or first[0][0] % 10 != first[2 * per_epoch][0] % 10


def test_source_shorter_than_two_windows(tmp_path, tokenizer):
    source = _source(tmp_path, "short", ["w0 w1 w2"])
    with pytest.raises(UserError, match="two windows"):
        build_mixture([source], tokenizer, tmp_path / "cache", context=8, n_samples=4, seed=0)


def test_validation_windows_stand_side_by_side(tmp_path, tokenizer):
    source = _source(tmp_path, "held", ["w0 w1 w2 w3 w4 w5 w6 w7 w8 w9"])
    windows = validation_windows(source, tokenizer, tmp_path / "cache", context=4)
    assert windows.tolist() == [[2, 3, 4, 5], [6, 7, 8, 9]]
    with pytest.raises(UserError, match="less than one window"):
        validation_windows(source, tokenizer, tmp_path / "cache", context=64)
