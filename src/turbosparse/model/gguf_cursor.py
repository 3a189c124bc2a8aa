"""A position in a mapped GGUF file, which reads nothing past its end."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from turbosparse.errors import UserError

MAX_NAME_BYTES = (1 << 16) - 1

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class Cursor:
    """A position in the mapped file that never moves past its end."""

    def __init__(self, path: Path, buffer: mmap.mmap) -> None:
        self.path = path
        self.buffer = buffer
        self.position = 0
        self.array_entries = 0

    def fail(self, problem: str) -> NoReturn:
        raise UserError(f"{self.path} is not a usable GGUF file: {problem}.")

    @property
    def left(self) -> int:
        return len(self.buffer) - self.position

    def take(self, count: int, what: str) -> int:
        """Move past `count` bytes; return where they start."""
        start = self.position
        if count > self.left:
            self.fail(f"{what} needs {count} bytes at offset {start} but the file ends at {len(self.buffer)}")
        self.position = start + count
        return start

    def u32(self, what: str) -> int:
        return int(_U32.unpack_from(self.buffer, self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64.unpack_from(self.buffer, self.take(8, what))[0])

    def text(self, what: str) -> bytes:
        length = self.u64(what)
        start = self.take(length, what)
        return self.buffer[start : start + length]

    def name(self, what: str) -> str:
        """A key or tensor name: short, not empty, strict UTF-8."""
        raw = self.text(f"the name of {what}")
        if not 0 < len(raw) <= MAX_NAME_BYTES:
            self.fail(f"the name of {what} is {len(raw)} bytes long, not 1 to {MAX_NAME_BYTES}")
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            self.fail(f"the name of {what}, {raw[:40]!r}, is not UTF-8")

    def array(self, dtype: np.dtype[np.generic], count: int, what: str) -> npt.NDArray[np.generic]:
        start = self.take(count * dtype.itemsize, what)
        return np.frombuffer(self.buffer[start : self.position], dtype)

    def texts(self, count: int, what: str) -> list[str]:
        """`count` strings; the one loop that runs a quarter of a million times, hence the local names."""
        buffer, position, end, unpack = self.buffer, self.position, len(self.buffer), _U64.unpack_from
        out: list[str] = []
        append = out.append
        for index in range(count):
            start = position + 8
            if start > end:
                self.fail(f"entry {index} of {what} lies past the end of the file")
            position = start + unpack(buffer, position)[0]
            if position > end:
                self.fail(f"entry {index} of {what} is longer than the rest of the file")
            append(buffer[start:position].decode("utf-8", "replace"))
        self.position = position
        return out
