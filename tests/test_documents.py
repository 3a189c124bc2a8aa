import json
import random
import struct

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from turbosparse import documents
from turbosparse.documents import read_documents, read_records
from turbosparse.errors import UserError


def _jsonl(records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


RECORDS = [{"text": "één\n", "source": "a"}, {"messages": [{"role": "user", "content": "hi"}]}, {"text": ""}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.jsonl.zst", "a.ndjson.ZST"])
def test_records_come_back_from_json_lines(tmp_path, name):
    raw = _jsonl(RECORDS)
    (tmp_path / name).write_bytes(zstandard.compress(raw) if name.lower().endswith("zst") else raw)
    assert list(read_records(tmp_path / name)) == RECORDS


@pytest.mark.parametrize("name", ["a.txt", "a.txt.zst", "README", "a.md.zst", "a.json"])
def test_every_other_name_is_one_document(tmp_path, name):
    raw = '{"text": 1}\n\nüber'.encode()
    (tmp_path / name).write_bytes(zstandard.compress(raw) if name.endswith("zst") else raw)
    assert list(read_documents(tmp_path / name)) == [raw.decode()]


def test_a_null_is_a_field_that_is_not_there(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(_jsonl([{"text": "a", "messages": None}, {"text": None, **RECORDS[1]}]))
    assert list(read_records(path)) == [{"text": "a"}, {"text": None, **RECORDS[1]}]


def test_blank_lines_byte_order_mark_and_missing_last_newline(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"text": "b"}')
    assert list(read_documents(path)) == ["a", "b"]


def test_another_text_field(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(_jsonl([{"content": "x", "text": 3}]))
    assert list(read_documents(path, "content")) == ["x"]
    with pytest.raises(UserError, match="line 1"):
        list(read_documents(path))


@given(st.lists(st.text(), max_size=30), st.integers(1, 300))
@settings(max_examples=40, deadline=None)
def test_zstd_in_many_frames_gives_the_same_documents(tmp_path_factory, texts, frame_bytes):
    raw = _jsonl({"text": text} for text in texts)
    path = tmp_path_factory.mktemp("frames") / "a.jsonl.zst"
    frames = [zstandard.compress(raw[i : i + frame_bytes]) for i in range(0, len(raw), frame_bytes)]
    path.write_bytes(b"".join(frames))
    assert list(read_documents(path)) == texts


def test_a_large_file_is_streamed(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    generator = random.Random(0)
    texts = ["".join(generator.choices("abcdefgh \n", k=3000)) for _ in range(700)]
    path.write_bytes(zstandard.compress(_jsonl({"text": text} for text in texts)))
    assert list(read_documents(path)) == texts


BAD = {
    "not json": (b'{"text": "a"}\nnot json\n', "line 2: not JSON"),
    "not an object": (b'{"text": "a"}\n\n["a"]\n', "line 3: not a JSON object"),
    "no text": (b'{"title": "a"}\n', "line 1: has neither"),
    "null": (b'{"text": null, "messages": null}\n', "line 1: has neither"),
    "text of another type": (b'{"text": 1}\n', "line 1: has neither"),
    "bad chat": (b'{"messages": [{"role": "user"}]}\n', "line 1: has neither"),
    "not utf-8": (b'{"text": "a"}\n{"text": "\xff"}\n', "line 2: not UTF-8"),
    "lone surrogate": (b'{"text": "\\ud800"}\n', "line 1: not UTF-8"),
    "deep": (b"[" * 200_000 + b"\n", "line 1: not JSON"),
    "long integer": (b'{"text": "a", "n": ' + b"9" * 5000 + b"}\n", "line 1: not JSON"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("compressed", [False, True])
def test_a_bad_line_is_one_sentence_with_file_and_line(tmp_path, case, compressed):
    raw, message = BAD[case]
    path = tmp_path / ("bad.jsonl.zst" if compressed else "bad.jsonl")
    path.write_bytes(zstandard.compress(raw) if compressed else raw)
    with pytest.raises(UserError) as caught:
        list(read_records(path))
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_chat_is_not_a_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(_jsonl(RECORDS))
    with pytest.raises(UserError, match="record 2"):
        list(read_documents(path))


def test_missing_file_folder_and_text_that_is_not_utf8(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl cannot be read"):
        list(read_records(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match="is a folder"):
        list(read_records(tmp_path))
    (tmp_path / "a.txt").write_bytes(b"a\nb\nc\xffd")
    with pytest.raises(UserError, match="line 3: not UTF-8"):
        list(read_records(tmp_path / "a.txt"))


def test_a_line_and_a_text_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 100)
    monkeypatch.setattr(documents, "MAX_TEXT_BYTES", 100)
    (tmp_path / "a.jsonl").write_bytes(_jsonl([{"text": "a"}, {"text": "a" * 100}]))
    with pytest.raises(UserError, match="line 2: longer"):
        list(read_records(tmp_path / "a.jsonl"))
    (tmp_path / "a.txt").write_bytes(b"a" * 101)
    with pytest.raises(UserError, match="split it"):
        list(read_records(tmp_path / "a.txt"))


def test_a_decompression_bomb_ends_at_the_line_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 1 << 20)
    path = tmp_path / "bomb.jsonl.zst"
    path.write_bytes(zstandard.compress(b" " * (1 << 28)))
    assert path.stat().st_size < 1 << 16
    with pytest.raises(UserError, match="line 1: longer"):
        list(read_records(path))


@pytest.mark.parametrize("keep", [1, 3, 10, 200, -1])
def test_zstd_that_is_cut_is_never_taken_for_whole(tmp_path, keep):
    path = tmp_path / "cut.jsonl.zst"
    path.write_bytes(zstandard.compress(_jsonl({"text": str(i)} for i in range(1000)))[:keep])
    with pytest.raises(UserError, match="zstd data"):
        list(read_records(path))


@pytest.mark.parametrize(
    "raw",
    [
        b"plain text",
        b"\x28\xb5\x2f\xfd" + b"\xff" * 50,
        # A frame that asks for a window of gigabytes.
        b"\x28\xb5\x2f\xfd" + struct.pack("BB", 0x00, 0xF8) + b"\x01\x00\x00",
    ],
)
def test_what_is_not_zstd(tmp_path, raw):
    path = tmp_path / "bad.txt.zst"
    path.write_bytes(raw)
    with pytest.raises(UserError, match="not valid zstd"):
        list(read_records(path))
