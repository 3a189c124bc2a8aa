"""The benchmarks' files: a folder with a subfolder for each task, of JSON lines or of comma-separated values."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from turbosparse.errors import UserError

Row = dict[str, Any]


class DataFolder:
    """The folder with a subfolder of files for each task; files are read when they are asked for, and kept."""

    def __init__(self, path: Path | None) -> None:
        if path is None:
            raise UserError("the tasks need their files; name the folder with --data-dir or TURBOSPARSE_EVAL_DATA.")
        if not path.is_dir():
            raise UserError(f"--data-dir {path} is not a folder; name the one that holds arc_easy/, piqa/ and so on.")
        self._path = path
        self._kept: dict[str, list[Row]] = {}
        self._digests: dict[str, str] = {}

    def rows(self, file: str) -> list[Row]:
        """The records of a .jsonl or .csv file, given by its path below the folder.

        Raises:
            UserError: it is missing, damaged or empty.
        """
        if file not in self._kept:
            path = self._path / file
            if not path.is_file():
                raise UserError(f"{path} does not exist; --data-dir must name the folder that holds {file}.")
            try:
                text = path.read_text(encoding="utf-8-sig")
            except UnicodeDecodeError:
                raise UserError(f"{path} is not UTF-8 text; download it again.") from None
            rows = list(_csv_rows(path, text) if path.suffix == ".csv" else _json_rows(path, text))
            if not rows:
                raise UserError(f"{path} is empty; download it again.")
            self._kept[file], self._digests[file] = rows, hashlib.sha256(text.encode()).hexdigest()
        return self._kept[file]

    def digest(self, files: Iterable[str]) -> str:
        """Tells the content of these files from any other.

        Raises:
            UserError: as `rows`.
        """
        digest = hashlib.sha256()
        for file in sorted(files):
            self.rows(file)
            digest.update(f"{file} {self._digests[file]}\n".encode())
        return digest.hexdigest()


def _csv_rows(path: Path, text: str) -> Iterator[Row]:
    try:
        yield from csv.DictReader(text.splitlines(keepends=True))
    except csv.Error as error:
        raise UserError(f"{path}: not a table of comma-separated values ({error}); download it again.") from None


def _json_rows(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: not a JSON object; download the file again.")
        yield row
