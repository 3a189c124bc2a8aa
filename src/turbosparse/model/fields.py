"""Typed, bounded reads from a mapping that came from outside: a config.json or the metadata of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

import numpy as np

from turbosparse.errors import UserError

Bounds = tuple[float, float]


class Fields:
    """The values of one file under one prefix.

    A key that is absent or null gives `default`; without a default, and for values of the wrong type or out of bounds,
    each read raises a `UserError` that names the file and the key.
    """

    def __init__(self, source: str, values: Mapping[str, object], prefix: str = "") -> None:
        self.source = source
        self._values = values
        self._prefix = prefix

    def fail(self, problem: str) -> NoReturn:
        raise UserError(f"{self.source}: {problem}.")

    def get(self, key: str) -> object:
        """The raw value, or None."""
        return self._values.get(self._prefix + key)

    def has(self, key: str) -> bool:
        return self.get(key) is not None

    def integer(self, key: str, bounds: Bounds, default: int | None = None) -> int:
        value = self._required(key, default)
        if isinstance(value, list) and value and all(entry == value[0] for entry in value):
            value = value[0]  # a value per layer, the same for all
        if isinstance(value, bool) or not isinstance(value, int):
            self.fail(f"{self._prefix}{key} is {_shown(value)}, not one whole number")
        if not bounds[0] <= value <= bounds[1]:
            self.fail(f"{self._prefix}{key} is {_shown(value)}, not from {bounds[0]} to {bounds[1]}")
        return value

    def number(self, key: str, bounds: Bounds, default: float | None = None) -> float:
        """A finite float, rounded to float32: the precision of GGUF, so that both sides of an export are equal."""
        value = self._required(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fail(f"{self._prefix}{key} is {_shown(value)}, not a number")
        if not bounds[0] <= value <= bounds[1]:  # nor is NaN; an integer that no float holds compares too
            self.fail(f"{self._prefix}{key} is {_shown(value)}, not from {bounds[0]} to {bounds[1]}")
        return float(np.float32(value))

    def flag(self, key: str, default: bool | None = None) -> bool:
        value = self._required(key, default)
        if not isinstance(value, bool):
            self.fail(f"{self._prefix}{key} is {_shown(value)}, not true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._required(key, default)
        if not isinstance(value, str):
            self.fail(f"{self._prefix}{key} is {_shown(value)}, not text")
        return value

    def _required(self, key: str, default: object) -> object:
        value = self.get(key)
        value = default if value is None else value
        if value is None:
            self.fail(f"it has no {self._prefix}{key}")
        return value


def _shown(value: object) -> str:
    text = repr(value[:3] if isinstance(value, list) else value)
    return text if len(text) <= 60 else text[:60] + "..."
