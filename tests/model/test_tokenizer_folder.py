"""What of a Hugging Face folder's tokenizer goes into a GGUF file; a folder that has none is one sentence."""

import json

import pytest
from tokenizer_files import CORPUS, byte_level, save_folder, sentencepiece, write_gguf
from transformers import PreTrainedTokenizerFast

from turbosparse.errors import UserError
from turbosparse.model.gguf import GGUFFile
from turbosparse.model.pretokenizers import flat_parts
from turbosparse.model.tokenizer import Tokenizer as OurTokenizer
from turbosparse.model.tokenizer import tokenizer_metadata


def test_the_name_of_the_cuts_is_detected(tmp_path):
    for name in ("smollm", "gpt-2", "qwen2", "llama-bpe", "tekken"):
        save_folder(byte_level(name), tmp_path)
        assert tokenizer_metadata(tmp_path)["tokenizer.ggml.pre"] == name


def test_merges_are_written_where_scores_cannot_say_them(tmp_path):
    save_folder(sentencepiece(False, True), tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    assert "tokenizer.ggml.merges" not in tokenizer_metadata(tmp_path)
    # Without the merge of "▁the", the token is still there and scores would build it.
    spec["model"]["merges"] = [merge for merge in spec["model"]["merges"] if "".join(merge) != "▁the"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    metadata = tokenizer_metadata(tmp_path)
    assert "tokenizer.ggml.merges" in metadata
    ours = OurTokenizer.from_gguf(GGUFFile.open(write_gguf(tmp_path / "a.gguf", metadata)))
    hf = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert ours.encode(CORPUS[0], parse_special=True) == hf.encode(CORPUS[0])


def test_chat_template_and_ends_of_turn_are_exported(tmp_path):
    hf = save_folder(byte_level("smollm"), tmp_path, chat_template="{{ messages[0].content }}{{ eos_token }}")
    start = hf.convert_tokens_to_ids("<|im_start|>")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [start, hf.eos_token_id]}))
    metadata = tokenizer_metadata(tmp_path)
    assert metadata["tokenizer.ggml.eos_token_id"] == hf.eos_token_id
    assert metadata["tokenizer.ggml.eot_token_id"] == start
    ours = OurTokenizer.from_gguf(GGUFFile.open(write_gguf(tmp_path / "a.gguf", metadata)))
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
    save_folder(byte_level("smollm"), tmp_path)
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
    save_folder(sentencepiece(True, False), tmp_path)
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
    save_folder(byte_level("gpt-2"), tmp_path)
    damage, message = BAD_FOLDERS[case]
    damage(tmp_path)
    with pytest.raises(UserError) as caught:
        tokenizer_metadata(tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_parts_come_in_order_however_deep_they_lie():
    part = {"type": "Split"}
    for number in range(5000):
        part = {"type": "Sequence", "parts": [{"type": str(number)}, part]}
    assert [leaf["type"] for leaf in flat_parts(part, "parts")] == [*map(str, reversed(range(5000))), "Split"]
    assert flat_parts(None, "parts") == []
