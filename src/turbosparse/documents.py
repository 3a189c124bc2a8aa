"""Text files as a stream of documents: JSON lines or plain text, either of them compressed with zstd.

`name.jsonl` (or `.ndjson`) holds one record a line; every other name is one document of plain text. A further `.zst`
means that it is compressed. Files come from outside: lines, decompressed output and decompression windows are bounded,
and a file is never held in memory as a whole unless it is one document.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn

import zstandard

from turbosparse.errors import UserError

MAX_LINE_BYTES = 64 << 20
MAX_TEXT_BYTES = 1 << 30
_RECORD_SUFFIXES = frozenset({".jsonl", ".ndjson"})
# A zstd block of 4 bytes can stand for 128 KiB, so this much input gives at most 64 MiB of output at once.
_COMPRESSED_CHUNK = 2048
_MAX_WINDOW_BYTES = 1 << 27  # what the zstd program accepts by default
_BOM = b"\xef\xbb\xbf"


def read_records(path: str | Path, text_field: str = "text") -> Iterator[dict[str, Any]]:
    """Records of a file, in order, one at a time.

    A record has `text_field` (a string) or "messages" (a list of {"role": str, "content": str}), which are left out if
    null; other keys are handed on unchecked. A plain-text file is one record {text_field: its text}. Blank lines are
    skipped.

    Raises:
        UserError: the file is missing, is not UTF-8, is not whole zstd, or a line is too long or not such a record.
    """
    path = Path(path)
    with _open(path) as stream:
        if not _is_records(path):
            yield {text_field: _whole_text(path, stream)}
            return
        number = 0
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise UserError(f"{path}, line {number}: longer than {MAX_LINE_BYTES >> 20} MiB; split the document.")
            if number == 1:
                line = line.removeprefix(_BOM)
            if line.strip():
                yield _record(path, number, line, text_field)


def read_documents(path: str | Path, text_field: str = "text") -> Iterator[str]:
    """Texts of a file, in order, one at a time.

    Raises:
        UserError: as `read_records`, or a record is a chat and has no text.
    """
    for number, record in enumerate(read_records(path, text_field), start=1):
        if not isinstance(record.get(text_field), str):
            raise UserError(
                f"{path}, record {number}: holds chat messages where text is needed; give it `{text_field}`."
            )
        yield record[text_field]


def _is_records(path: Path) -> bool:
    plain = path.with_suffix("") if path.suffix.lower() == ".zst" else path
    return plain.suffix.lower() in _RECORD_SUFFIXES


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed; what goes wrong while they are read is a UserError too."""
    try:
        with path.open("rb") as raw:
            if path.suffix.lower() == ".zst":
                with io.BufferedReader(_ZstdReader(path, raw), buffer_size=1 << 16) as stream:
                    yield stream
            else:
                yield raw
    except IsADirectoryError as error:
        raise UserError(f"{path} is a folder; give a text or JSON-lines file.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a text or JSON-lines file.") from error


class _ZstdReader(io.RawIOBase):
    """Bytes of the zstd frames of a file.

    zstandard's own stream reader takes a file that was cut in the middle of a frame for whole, which would pass half a
    data set for all of it.
    """

    def __init__(self, path: Path, raw: IO[bytes]) -> None:
        self._path, self._raw = path, raw
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._input = b""  # read from the file, not yet given to a frame
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output and self._advance():
            pass
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def _advance(self) -> bool:
        """Decompress one more chunk; False at the end of the last frame."""
        chunk = self._input or self._raw.read(_COMPRESSED_CHUNK)
        self._input = b""
        if not chunk:
            if self._frame is not None:
                raise UserError(f"{self._path} ends in the middle of its zstd data; download or compress it again.")
            return False
        if self._frame is None:
            self._frame = self._decompressor.decompressobj()
        try:
            self._output = memoryview(self._frame.decompress(chunk))
        except zstandard.ZstdError as error:
            raise UserError(f"{self._path} is not valid zstd data; download or compress it again.") from error
        if self._frame.eof:
            self._input, self._frame = self._frame.unused_data, None
        return True


def _whole_text(path: Path, stream: IO[bytes]) -> str:
    parts: list[bytes] = []
    size = 0
    while part := stream.read(1 << 20):
        size += len(part)
        if size > MAX_TEXT_BYTES:
            raise UserError(f"{path}: more than {MAX_TEXT_BYTES >> 30} GiB of plain text; split it or use JSON lines.")
        parts.append(part)
    raw = b"".join(parts).removeprefix(_BOM)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text; convert the file to UTF-8.") from error


def _record(path: Path, number: int, line: bytes, text_field: str) -> dict[str, Any]:
    def fail(problem: str) -> NoReturn:
        raise UserError(f"{path}, line {number}: {problem}.")

    try:
        record = json.loads(line.decode("utf-8"))
        if b"\\u" in line:  # an escape is the one way to a lone surrogate, which no tokenizer can encode
            json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeError:
        fail("not UTF-8 text; convert the file to UTF-8")
    except (ValueError, RecursionError):
        fail('not JSON; a .jsonl file holds one object such as {"text": "..."} on every line')
    if not isinstance(record, dict):
        fail('not a JSON object; a line looks like {"text": "..."}')
    if record.get("messages") is None:
        record.pop("messages", None)  # how data sets write a column that this record does not use
    if _is_chat(record["messages"]) if "messages" in record else isinstance(record.get(text_field), str):
        return record
    return fail(f'has neither a string "{text_field}" nor "messages" with "role" and "content" strings')


def _is_chat(messages: object) -> bool:
    return isinstance(messages, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in messages
    )
