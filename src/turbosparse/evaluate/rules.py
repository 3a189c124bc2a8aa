"""What a field of a benchmark's row must hold: what the harness's templates can read and what can be scored.

A test split whose answers are hidden has labels such as -1 or "": scored as they are, they would count as wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

from turbosparse.evaluate.data_folder import Row

Rule = Callable[[Any, Row], bool]
"""Whether a field's value is valid; what that depends on stands in the row."""


def text(value: Any, _: Row) -> bool:
    return isinstance(value, str) and bool(value.strip())


def maybe_empty(value: Any, _: Row) -> bool:
    return isinstance(value, str)


def texts(value: Any, row: Row, least: int = 1) -> bool:
    return isinstance(value, list) and len(value) >= least and all(text(each, row) for each in value)


def one_of(*answers: Any) -> Rule:
    return lambda value, _: any(type(value) is type(answer) and value == answer for answer in answers)


def lettered_texts(value: Any, row: Row) -> bool:
    if not isinstance(value, dict) or not all(texts(value.get(key), row) for key in ("text", "label")):
        return False
    return len(value["text"]) == len(value["label"])


def letter(value: Any, row: Row) -> bool:
    return isinstance(value, str) and value in row["choices"]["label"]


def padded_letter(value: Any, row: Row) -> bool:
    """OpenBookQA's, whose template removes spaces in front."""
    return isinstance(value, str) and letter(value.lstrip(), row)


def ending(value: Any, row: Row) -> bool:
    """HellaSwag's: the place of the right ending, a number or its digits."""
    return str(value) in map(str, range(len(row["endings"])))


def with_a_gap(value: Any, row: Row) -> bool:
    """WinoGrande's: what follows the gap is what is scored."""
    return isinstance(value, str) and text(value.partition("_")[2], row)


def boxed(value: Any, _: Row) -> bool:
    """A solution with its answer as the harness finds it: after the command boxed, up to where its braces close."""
    if not isinstance(value, str):
        return False
    _before, found, rest = value.rpartition(r"\boxed")
    depths = accumulate({"{": 1, "}": -1}.get(each, 0) for each in rest)
    return r"\boxed " in value or (bool(found) and rest.startswith("{") and 0 in depths)
