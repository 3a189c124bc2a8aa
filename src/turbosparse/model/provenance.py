"""Where a checkpoint comes from and what its licence allows: the front matter of README.md, LICENSE and NOTICE.

The Hugging Face hub keeps both in the front matter of README.md, so that is where every stage of ours keeps them too.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

README = "README.md"
_FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
LICENCE_NAME = re.compile(r"[A-Za-z0-9.+_-]{1,64}")
_HUB_NAME = re.compile(r"[\w.-]{1,96}(?:/[\w.-]{1,96})?")
_MOST = 1 << 16  # characters of a README that are looked at
_LICENCE_FILES = ("LICENSE*", "NOTICE*")


@dataclass(frozen=True)
class Provenance:
    """`license` as the hub names licences ("apache-2.0"); `base_model` a hub id or a name; None where unknown."""

    license: str | None = None
    base_model: str | None = None


def _field(front: str, key: str, value: re.Pattern[str]) -> str | None:
    found = re.search(rf"^{key}:[ \t]*[\"']?({value.pattern})[\"']?[ \t]*\r?$", front, re.MULTILINE)
    return found.group(1) if found else None


def provenance(folder: Path) -> Provenance:
    """What README.md of a checkpoint says; nothing where there is none."""
    try:
        with (folder / README).open(encoding="utf-8", errors="replace") as handle:
            front = _FRONT_MATTER.match(handle.read(_MOST))
    except OSError:
        return Provenance()
    if front is None:
        return Provenance()
    return Provenance(
        _field(front.group(1), "license", LICENCE_NAME),
        _field(front.group(1), "base_model", _HUB_NAME),
    )


def note_provenance(folder: Path, origin: Provenance, text: str) -> None:
    """Write a README.md of two lines for a checkpoint that nobody has described yet."""
    lines = ["---"]
    lines += [f"license: {origin.license}"] if origin.license else []
    lines += [f"base_model: {origin.base_model}"] if origin.base_model else []
    (folder / README).write_text("\n".join([*lines, "---", text, ""]), encoding="utf-8")


def carry_licence(source: Path, target: Path) -> None:
    """Copy README.md, LICENSE and NOTICE of one checkpoint to the next one made from it."""
    for pattern in (README, *_LICENCE_FILES):
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)
