"""A tokenizer goes from a Hugging Face folder to GGUF metadata and back and must give the ids of transformers."""

import json
import os
import random
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import pytest
from gguf import GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from turbosparse.errors import UserError
from turbosparse.model.gguf import GGUFFile
from turbosparse.model.pretokenizers import PRE_TOKENIZERS, flat_parts
from turbosparse.model.tokenizer import Tokenizer as OurTokenizer
from turbosparse.model.tokenizer import tokenizer_metadata
from turbosparse.model.vocabulary import Vocabulary, merges_from_scores

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and it's 12345 times 3.14159 quicker than I'LL ever be!",
    "def read(path):\n    with open(path) as file:\n        return file.read()\n\n\n# über façade naïve coöperate",
    "日本語のテキスト と 한국어 텍스트, emoji 😀😀 👩‍👩‍👧 and   runs   of    spaces\t\ttabs\r\n\r\n",
    "hello hello world world foo_bar foo_bar fooBar FooBar HTTPServer 2024 2025 1999 ½ ²",
] * 5
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<bos>", "<unk>"]
OWN = ["<tool_call>", "\n\n\n"]

_hostile = st.sampled_from(
    [*SPECIALS, *OWN, "<0x0A>", "[PAD400]", "▁", "  ", "\n\n", "12345", "e\u0301", "'LL", "\u200d"]
)
TEXTS = st.lists(
    st.one_of(st.text(max_size=12), _hostile, st.sampled_from(CORPUS).map(lambda text: text[:40])), max_size=8
).map("".join)


def _add_tokens(tokenizer):
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in OWN])


def _byte_level(name):
    entry = PRE_TOKENIZERS[name]
    tokenizer = Tokenizer(models.BPE(ignore_merges=entry.ignore_merges))
    tokenizer.pre_tokenizer, tokenizer.normalizer = entry.build(), entry.normalizer()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=380, special_tokens=SPECIALS, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    _add_tokens(tokenizer)
    return tokenizer


def _sentencepiece(prefix, complete):
    """`complete`: every cut of a token into two others is a merge, as in SentencePiece; else what training saw."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIALS))
    model = json.loads(trained.to_str())["model"]
    tokens = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [token for token in model["vocab"] if token not in SPECIALS]
    merges = [tuple(merge) for merge in model["merges"]]
    if complete:
        rank = {left + right: index for index, (left, right) in reversed(list(enumerate(merges)))}
        scores = [-float(rank.get(token, len(merges))) for token in tokens]
        merges = merges_from_scores(
            Vocabulary("", "llama", tokens, [1] * len(tokens), scores, []), set(rank) | set(tokens)
        )
    bpe = models.BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        byte_fallback=True,
        fuse_unk=True,
        unk_token="<unk>",
    )
    tokenizer = Tokenizer(bpe)
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    if not prefix:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tail = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *tail])
    _add_tokens(tokenizer)
    bos = tokenizer.token_to_id("<bos>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", bos)]
    )
    return tokenizer


KINDS = {
    **{name: (_byte_level, (name,)) for name in ("smollm", "gpt-2", "qwen2", "llama-bpe", "tekken")},
    "mistral": (_sentencepiece, (True, True)),
    "gemma": (_sentencepiece, (False, True)),
    "some merges": (_sentencepiece, (False, False)),
}


def _save_folder(tokenizer, folder, **options):
    hf = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<|im_end|>", unk_token="<unk>", **options
    )
    hf.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"vocab_size": tokenizer.get_vocab_size() + 3}))
    return hf


def _write_gguf(path, metadata):
    """Only metadata; values are written as the export writes them."""
    writer = GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """(our tokenizer, transformers' tokenizer, folder) of one kind."""
    make, arguments = KINDS[request.param]
    folder = tmp_path_factory.mktemp("hf")
    hf = _save_folder(make(*arguments), folder)
    file = GGUFFile.open(_write_gguf(folder / "model.gguf", tokenizer_metadata(folder)))
    return OurTokenizer.from_gguf(file), hf, folder


_many = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@_many
@given(text=TEXTS)
def test_ids_equal_transformers(pair, text):
    ours, hf, _ = pair
    assert ours.encode(text, parse_special=True) == hf.encode(text)
    assert ours.encode(text, add_bos=False, parse_special=True) == hf.encode(text, add_special_tokens=False)


@_many
@given(text=TEXTS)
def test_plain_text_never_becomes_a_control_token(pair, text):
    ours, hf, _ = pair
    ids = ours.encode(text, add_bos=False)
    assert ids == hf.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert not {hf.convert_tokens_to_ids(special) for special in SPECIALS} & set(ids)


@_many
@given(text=TEXTS)
def test_decoding_gives_the_text_back_also_token_by_token(pair, text):
    ours, _, _ = pair
    if ours.encode("\u00c5") == ours.encode("A\u030a"):
        text = unicodedata.normalize("NFC", text)
    if ours._vocabulary.model == "llama":
        text = text.replace("▁", " ")  # SentencePiece cannot tell its mark from a space
    ids = ours.encode(text, add_bos=False)
    whole = ours.decode(ids)
    # With a prefix, text after an added token gets a space too; decoding cannot know that it was not written.
    if not (ours._segmenter.space_prefix and any(token in text for token in OWN)):
        assert whole == text
    stream = ours.stream()
    pieces = [stream.step(index) for index in ids]
    assert stream.finish() == ""
    joined = "".join(pieces)
    assert (joined.removeprefix(" ") if ours._segmenter.space_prefix else joined) == whole


@_many
@given(text=st.one_of(TEXTS, st.text(st.characters(max_codepoint=127), max_size=40)))
def test_the_whole_model_gives_what_the_small_one_gives(pair, text):
    ours, _, _ = pair
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(ours._segmenter), "cost_of_whole", 1 << 62)
        small = [ours.encode(text, parse_special=special) for special in (False, True)]
        patch.setattr(type(ours._segmenter), "cost_of_whole", -1)
        assert [ours.encode(text, parse_special=special) for special in (False, True)] == small


def test_a_saved_folder_gives_the_same_ids(pair, tmp_path):
    ours, hf, _ = pair
    ours.save_hf(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*CORPUS[:4], "<bos>x<|im_end|> y<tool_call>\n\n\n z"]:
        assert again.encode(text) == hf.encode(text)
        assert again.decode(again.encode(text), skip_special_tokens=True) == ours.decode(ours.encode(text, None, True))
    assert (again.bos_token, again.eos_token) == ("<bos>", "<|im_end|>")


def test_a_stream_never_emits_half_a_character(pair):
    ours, _, _ = pair
    ids = ours.encode("a🦊b", add_bos=False)
    stream = ours.stream()
    seen = [stream.step(index) for index in ids]
    assert "".join(seen).strip() == "a🦊b"
    assert "" in seen  # the fox takes several tokens
    stream = ours.stream()
    text = "".join(stream.step(index) for index in ids[:-2])
    assert "\ufffd" not in text
    assert stream.finish() == "\ufffd"


def test_special_ids_and_padding(pair):
    ours, hf, folder = pair
    assert ours.vocab_size == len(hf) + 3
    assert (ours.bos_id, ours.eos_id) == (hf.bos_token_id, hf.eos_token_id)
    assert ours.eos_ids == {hf.convert_tokens_to_ids(text) for text in ("<|im_end|>", "<|endoftext|>")}
    metadata = tokenizer_metadata(folder)
    assert metadata["tokenizer.ggml.tokens"][-1] == f"[PAD{ours.vocab_size - 1}]"
    assert metadata["tokenizer.ggml.token_type"][-3:] == [5, 5, 5]
    assert ours.decode([hf.eos_token_id]) == ""
    assert ours.decode([hf.eos_token_id], skip_special=False).strip() == "<|im_end|>"
    with pytest.raises(ValueError, match="outside the vocabulary"):
        ours.decode([ours.vocab_size])


def test_half_a_surrogate_pair_is_one_sentence(pair):
    with pytest.raises(UserError, match="not valid Unicode"):
        pair[0].encode("a\ud800")


def test_the_name_of_the_cuts_is_detected(tmp_path):
    for name in ("smollm", "gpt-2", "qwen2", "llama-bpe", "tekken"):
        _save_folder(_byte_level(name), tmp_path)
        assert tokenizer_metadata(tmp_path)["tokenizer.ggml.pre"] == name


def test_merges_are_written_where_scores_cannot_say_them(tmp_path):
    _save_folder(_sentencepiece(False, True), tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    assert "tokenizer.ggml.merges" not in tokenizer_metadata(tmp_path)
    # Without the merge of "▁the", the token is still there and scores would build it.
    spec["model"]["merges"] = [merge for merge in spec["model"]["merges"] if "".join(merge) != "▁the"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    metadata = tokenizer_metadata(tmp_path)
    assert "tokenizer.ggml.merges" in metadata
    ours = OurTokenizer.from_gguf(GGUFFile.open(_write_gguf(tmp_path / "a.gguf", metadata)))
    hf = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert ours.encode(CORPUS[0], parse_special=True) == hf.encode(CORPUS[0])


def test_chat_template_and_ends_of_turn_are_exported(tmp_path):
    hf = _save_folder(_byte_level("smollm"), tmp_path, chat_template="{{ messages[0].content }}{{ eos_token }}")
    start = hf.convert_tokens_to_ids("<|im_start|>")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [start, hf.eos_token_id]}))
    metadata = tokenizer_metadata(tmp_path)
    assert metadata["tokenizer.ggml.eos_token_id"] == hf.eos_token_id
    assert metadata["tokenizer.ggml.eot_token_id"] == start
    ours = OurTokenizer.from_gguf(GGUFFile.open(_write_gguf(tmp_path / "a.gguf", metadata)))
    messages = [{"role": "user", "content": "hi"}]
    prompt = ours.apply_chat_template(messages)
    assert prompt == "hi<|im_end|>" == hf.apply_chat_template(messages, tokenize=False)
    assert ours.encode(prompt, parse_special=True)[-1] == ours.eos_id
    assert start in ours.eos_ids
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "tools", "template": "no"}, {"name": "default", "template": "yes"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert tokenizer_metadata(tmp_path)["tokenizer.chat_template"] == "yes"


def _edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def _spoil_template(template):
    def damage(folder):
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        _edit(folder / "tokenizer_config.json", lambda c: c.update(chat_template=template))

    return damage


def test_a_template_without_a_name_is_no_template(tmp_path):
    _save_folder(_byte_level("smollm"), tmp_path)
    _spoil_template([{"name": ["a"], "template": "x"}, 3, {"template": "y"}])(tmp_path)
    assert "tokenizer.chat_template" not in tokenizer_metadata(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"single": [{"SpecialToken": None}]},
        {"single": [{"SpecialToken": {"id": ["<bos>"]}}]},
        {"single": [None]},
        {"special_tokens": {"<bos>": {"ids": 5}}},
        {"special_tokens": {"<bos>": None}},
        {"special_tokens": ["<bos>"]},
    ],
    ids=str,
)
def test_a_post_processor_that_names_no_bos_adds_none(tmp_path, changes):
    _save_folder(_sentencepiece(True, False), tmp_path)
    assert tokenizer_metadata(tmp_path)["tokenizer.ggml.add_bos_token"]
    _edit(tmp_path / "tokenizer.json", lambda t: t["post_processor"].update(changes))
    assert not tokenizer_metadata(tmp_path)["tokenizer.ggml.add_bos_token"]


PREFIXED = {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}
BAD_FOLDERS = {
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "not json": (lambda f: (f / "tokenizer.json").write_text("{"), "not a JSON object"),
    "list": (lambda f: (f / "tokenizer.json").write_text("[]"), "not a JSON object"),
    "not utf-8": (lambda f: (f / "tokenizer.json").write_bytes(b"\xff"), "UTF-8"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "small model": (lambda f: _edit(f / "config.json", lambda c: c.update(vocab_size=9)), "the model has 9 tokens"),
    "huge model": (lambda f: _edit(f / "config.json", lambda c: c.update(vocab_size=1 << 40)), "vocab_size"),
    "unigram": (lambda f: _edit(f / "tokenizer.json", lambda t: t["model"].update(type="Unigram")), "BPE"),
    "cuts": (lambda f: _edit(f / "tokenizer.json", lambda t: t.update(pre_tokenizer=PREFIXED)), "none of"),
    "lowercase": (
        lambda f: _edit(f / "tokenizer.json", lambda t: t.update(normalizer={"type": "Lowercase"})),
        "none of",
    ),
    "bad merge": (lambda f: _edit(f / "tokenizer.json", lambda t: t["model"].update(merges=["abc"])), "merge 'abc'"),
    "no merges": (lambda f: _edit(f / "tokenizer.json", lambda t: t["model"].pop("merges")), "merge"),
    "bad id": (lambda f: _edit(f / "tokenizer.json", lambda t: t["model"]["vocab"].update(x="1")), "not a text with"),
    "negative id": (lambda f: _edit(f / "tokenizer.json", lambda t: t["model"]["vocab"].update(x=-1)), "the id -1"),
    "bad added": (lambda f: _edit(f / "tokenizer.json", lambda t: t.update(added_tokens=[3])), "added_tokens"),
    "half a pair": (
        lambda f: _edit(f / "tokenizer.json", lambda t: t["model"]["vocab"].update({"\ud800": 7})),
        "ggml.tokens would hold half a surrogate pair",
    ),
    "half a pair in a template": (_spoil_template("\ud800"), "chat_template would hold half a surrogate pair"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_bad_folder_is_one_sentence(tmp_path, case):
    _save_folder(_byte_level("gpt-2"), tmp_path)
    damage, message = BAD_FOLDERS[case]
    damage(tmp_path)
    with pytest.raises(UserError) as caught:
        tokenizer_metadata(tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


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
    path = _write_gguf(tmp_path / "bad.gguf", {key: value for key, value in metadata.items() if value is not None})
    with pytest.raises(UserError) as caught:
        OurTokenizer.from_gguf(GGUFFile.open(path)).encode("ab")
    assert message in str(caught.value)
    assert "bad.gguf" in str(caught.value)


def test_a_merge_cannot_smuggle_a_control_token_into_plain_text(tmp_path):
    metadata = TINY | {"tokenizer.ggml.token_type": [1, 1, 3, 3]}
    ours = OurTokenizer.from_gguf(GGUFFile.open(_write_gguf(tmp_path / "a.gguf", metadata)))
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


# --- the real models -------------------------------------------------------------------------------------------------

REAL = {
    "smollm2": "SmolLM2-135M-Instruct.Q4_1.gguf",
    "qwen": "qwen2.5-coder-0.5b-instruct.gguf",
    "gemma": "gemma-3-270m-q4_k_m.gguf",
}


@pytest.fixture(scope="module", params=REAL)
def real(request):
    folder = os.environ.get("TURBOSPARSE_TEST_MODELS")
    if not folder:
        pytest.skip("TURBOSPARSE_TEST_MODELS does not name the folder of the real models")
    path = Path(folder) / REAL[request.param]
    if not path.is_file():
        pytest.skip(f"{path.name} is not in TURBOSPARSE_TEST_MODELS")
    return path


def _random_texts():
    generator = random.Random(0)
    alphabet = "abcXYZ 019 \n\t.,'!?<>|_éßÅ日😀\u200d▁\u00a0½²"
    texts = [*CORPUS[:4], *SPECIALS, *OWN, "<eos>a", " " * 100 + "x", "\n" * 40, "a" * 300, "<0x0A>", ""]
    texts += ["".join(generator.choices(alphabet, k=generator.randint(1, 40))) for _ in range(800)]
    for _ in range(300):
        ranges = [(0x20, 0x2FF), (0x370, 0x2FFF), (0x3000, 0xD7FF), (0x1F300, 0x1FAFF)]
        texts.append("".join(chr(generator.randint(*generator.choice(ranges))) for _ in range(20)))
    # llama.cpp does not normalise, Qwen's own tokenizer does: in normal form both must agree.
    return [unicodedata.normalize("NFC", text) for text in texts]


@pytest.mark.models
def test_ids_equal_llama_cpp(real):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra bench)")
    peer = llama_cpp.Llama(str(real), vocab_only=True, verbose=False)
    ours = OurTokenizer.from_gguf(GGUFFile.open(real))
    for text in _random_texts():
        for special in (False, True):
            expected = peer.tokenize(text.encode(), add_bos=False, special=special)
            assert ours.encode(text, add_bos=False, parse_special=special) == expected, text


@pytest.mark.models
def test_a_real_tokenizer_goes_to_a_folder_and_back(real, tmp_path):
    ours = OurTokenizer.from_gguf(GGUFFile.open(real))
    ours.save_hf(tmp_path)
    hf = AutoTokenizer.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": ours.vocab_size}))
    metadata = tokenizer_metadata(tmp_path)
    again = OurTokenizer.from_gguf(GGUFFile.open(_write_gguf(tmp_path / "a.gguf", metadata)))
    assert (again.eos_ids, again.bos_id, again.add_bos) == (ours.eos_ids, ours.bos_id, ours.add_bos)
    for text in _random_texts():
        ids = ours.encode(text, parse_special=True)
        assert again.encode(text, parse_special=True) == ids == hf.encode(text)


def test_parts_come_in_order_however_deep_they_lie():
    part = {"type": "Split"}
    for number in range(5000):
        part = {"type": "Sequence", "parts": [{"type": str(number)}, part]}
    assert [leaf["type"] for leaf in flat_parts(part, "parts")] == [*map(str, reversed(range(5000))), "Split"]
    assert flat_parts(None, "parts") == []
