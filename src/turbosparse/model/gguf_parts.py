"""Models in several GGUF files, NAME-00001-of-00003.gguf and so on, as llama.cpp's gguf-split writes them.

The first part has the keys of the model, and each some of the tensors, the first perhaps none. A part says with keys of
its own which one of how many it is; the others are found by their names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from turbosparse.errors import UserError

SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")
_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.gguf)", re.IGNORECASE | re.DOTALL)


def part_names(name: str) -> list[str]:
    """The names of all parts of a model, in order, of which `name` is one; of a whole file itself alone."""
    match = _NAME.fullmatch(name)
    if match is None or not 1 <= int(match["number"]) <= int(match["count"]):
        return [name]
    count = match["count"]
    return [f"{match['stem']}-{number:05d}-of-{count}{match['suffix']}" for number in range(1, int(count) + 1)]


def whole_name(name: str) -> str:
    """The name that a file would have in one part."""
    match = _NAME.fullmatch(name)
    return name if match is None else match["stem"] + match["suffix"]


def files_of(path: Path) -> list[Path]:
    """The files of the model that `path` is or is a part of, as far as they are there."""
    return [file for name in part_names(path.name) if (file := path.with_name(name)).is_file()]


def later_parts(path: Path, metadata: Mapping[str, object]) -> list[Path]:
    """Where the parts after the first lie, in order; nowhere if the file at `path` is whole.

    Raises:
        UserError: it is not the first part, its name does not fit its keys, or a part is missing.
    """
    place, count = _place(path, metadata)
    if count == 1:
        return []
    names = part_names(path.name)
    if len(names) != count or names[place] != path.name:
        raise UserError(
            f"{path} is part {place + 1} of {count} of a model, whose parts are found by names that end in "
            f"-{place + 1:05d}-of-{count:05d}.gguf; give all of them their names back."
        )
    if place > 0:
        raise UserError(f"{path} is part {place + 1} of {count} of a model; give the first, {names[0]}.")
    parts = [path.with_name(name) for name in names[1:]]
    if missing := next((part for part in parts if not part.is_file()), None):
        raise UserError(
            f"{path} is one of {count} parts of a model, and {missing.name} is not beside it; put it there."
        )
    return parts


def check_part(path: Path, metadata: Mapping[str, object], place: int, count: int) -> None:
    """Whether the file at `path` says that it stands at `place`, counted from 0, of so many parts.

    Raises:
        UserError: it says something else.
    """
    found = _place(path, metadata)
    if found != (place, count):
        raise UserError(
            f"{path} says that it is part {found[0] + 1} of {found[1]}, not {place + 1} of {count}; download it again."
        )


def _place(path: Path, metadata: Mapping[str, object]) -> tuple[int, int]:
    """Which part a file is, counted from 0, and of how many: (0, 1) if it says nothing."""
    values = []
    for key, default in (("split.no", 0), ("split.count", 1)):
        value = metadata.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise UserError(f"{path} is not a usable GGUF file: {key} is {str(value)[:40]}, not a whole number.")
        values.append(value)
    place, count = values
    if not 0 <= place < count:
        raise UserError(f"{path} is not a usable GGUF file: it claims to be part {place} of {count}, counted from 0.")
    return place, count
