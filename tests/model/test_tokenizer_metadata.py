"""Any vocabulary that a GGUF file holds works or is one sentence."""

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_files import write_gguf

from turbosparse.errors import UserError
from turbosparse.model.gguf import GGUFFile
from turbosparse.model.pretokenizers import PRE_TOKENIZERS
from turbosparse.model.tokenizer import Tokenizer as OurTokenizer

TINY = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<e>"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 3,
}
BAD_METADATA = {
    "no tokenizer": ({"model": None}, "tokenizer.ggml.model"),
    "other model": ({"model": "bert"}, "'bert'"),
    "unknown cuts": ({"pre": "klingon"}, "'klingon'"),
    "no tokens": ({"tokens": None}, "tokens is missing"),
    "tokens of another type": ({"tokens": [1, 2]}, "not an array of str"),
    "a token without end": ({"tokens": ["a", "b", "ab", "x" * 5000]}, "more than 1024 characters"),
    "too few types": ({"token_type": [1, 1]}, "2 entries for 4 tokens"),
    "unknown type": ({"token_type": [1, 1, 1, 9]}, "type outside"),
    "bad merge": ({"merges": ["ab"]}, "'ab'"),
    "merge of unknown tokens": ({"merges": ["x y"]}, "merges do not fit"),
    "merge to an unknown token": ({"merges": ["b a"]}, "merges do not fit"),
    "eos out of range": ({"eos_token_id": 4}, "eos_token_id is 4"),
    "bos is text": ({"bos_token_id": "a"}, "bos_token_id is a"),
    "add_bos is a number": ({"add_bos_token": 3}, "not a boolean"),
    "llama without scores": ({"model": "llama", "merges": None}, "scores is missing"),
    "llama with few scores": ({"model": "llama", "merges": None, "scores": [1.0]}, "1 entries for 4"),
    "scores that are no numbers": (
        {"model": "llama", "merges": None, "scores": [1.0, float("nan"), 0.0, 0.0]},
        "not a finite number",
    ),
}


@pytest.mark.parametrize("case", BAD_METADATA)
def test_bad_metadata_is_one_sentence(tmp_path, case):
    change, message = BAD_METADATA[case]
    metadata = TINY | {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    path = write_gguf(tmp_path / "bad.gguf", {key: value for key, value in metadata.items() if value is not None})
    with pytest.raises(UserError) as caught:
        OurTokenizer.from_gguf(GGUFFile.open(path)).encode("ab")
    assert message in str(caught.value)
    assert "bad.gguf" in str(caught.value)


def test_a_merge_cannot_smuggle_a_control_token_into_plain_text(tmp_path):
    metadata = TINY | {"tokenizer.ggml.token_type": [1, 1, 3, 3]}
    ours = OurTokenizer.from_gguf(GGUFFile.open(write_gguf(tmp_path / "a.gguf", metadata)))
    assert ours.encode("ab") == [0, 1]
    assert ours.encode("ab", parse_special=True) == [2]


_PIECES = ["a", "b", "ab", "▁", "▁a", "", "<0x0A>", "<0xZZ>", "<e>", "é", "Ġ", " ", "  ", "\x00", "<unk>"]


@settings(max_examples=400, deadline=None)
@given(
    model=st.sampled_from(["gpt2", "llama"]),
    pre=st.sampled_from(sorted(PRE_TOKENIZERS)),
    tokens=st.lists(
        st.tuples(st.sampled_from(_PIECES), st.integers(1, 6), st.floats(width=32)), min_size=1, max_size=12
    ),
    merges=st.lists(st.tuples(st.sampled_from(_PIECES), st.sampled_from(_PIECES)).map(" ".join), max_size=4),
)
def test_any_vocabulary_works_or_is_one_sentence(model, pre, tokens, merges):
    texts, types, scores = map(list, zip(*tokens, strict=True))
    named = {"model": model, "pre": pre, "tokens": texts, "token_type": types, "scores": scores, "merges": merges}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in named.items()}
    try:
        ours = OurTokenizer.from_gguf(SimpleNamespace(path="any.gguf", metadata=metadata))
        for special in (False, True):
            ids = ours.encode("ab a  é\n<e>\x00<0x0A>▁", parse_special=special)
            assert all(0 <= index < len(texts) for index in ids)
            assert isinstance(ours.decode(ids), str)
    except UserError as error:
        assert "any.gguf" in str(error)
