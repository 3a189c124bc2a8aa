"""Stages that need an optional dependency say which one, instead of a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from turbosparse.errors import UserError


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Imports inside the block belong to `pip install turbosparse[name]`.

    Raises:
        UserError: one of them is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module in ("", "turbosparse"):
            raise
        raise UserError(
            f"this needs the package {module}; install it with: pip install 'turbosparse[{name}]'"
        ) from None
