"""Where a command's output goes: results on stdout, everything about the run on stderr.

With --json, stdout holds exactly one JSON object, so that `turbosparse ... --json | jq` always works.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

Progress = Callable[[int, int], None]
"""Reports (done, total) of something that takes a while."""
_PATIENCE_SECONDS = 0.5


def stderr_console() -> Console:
    """A console on stderr: notices, progress and statistics."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def stdout_console() -> Console:
    """A console on stdout: the tables and charts that a command was asked for."""
    from rich.console import Console

    return Console(highlight=False)


def notice(text: str) -> None:
    """Say something about the run, on stderr."""
    print(text, file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Text from outside for a terminal: what is no character to show, such as a control code, as an escape."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def plain(text: str, style: str = "") -> Text:
    """Text from outside for a table: `printable`, and nothing in it is markup."""
    from rich.text import Text

    return Text(printable(text), style)


def emit(record: Mapping[str, Any]) -> None:
    """Print the one JSON object of a command. NaN and infinity, which JSON lacks, become null.

    In ASCII, so that it is whole on a stdout of any encoding.
    """
    print(json.dumps(_finite(record), allow_nan=False), flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


@contextmanager
def progress(description: str) -> Iterator[Progress]:
    """A progress bar on stderr while the block runs, once that has taken half a second; silent outside of a terminal.

    What is done sooner needs none, and drawing it takes longer to import than a small model takes to load.
    """
    with ExitStack() as stack:
        shown: Progress | None = None
        begun = time.monotonic()

        def report(done: int, total: int) -> None:
            nonlocal shown
            if shown is None and time.monotonic() - begun > _PATIENCE_SECONDS:
                shown = stack.enter_context(_bar(description)) if sys.stderr.isatty() else lambda done, total: None
            if shown is not None:
                shown(done, total)

        yield report


@contextmanager
def _bar(description: str) -> Iterator[Progress]:
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=stderr_console(), transient=True) as bars:
        task = bars.add_task(printable(description), total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def percent(share: float | None) -> str:
    """0.871 as "87.1 %"; a dash where there is no figure."""
    return "-" if share is None else f"{share:.1%}".replace("%", " %")


def megabytes(count: float | None) -> str:
    """Bytes as "61.3 MB" (1 MB = 10^6 bytes, as bandwidths are given); a dash where there is no figure."""
    return "-" if count is None else f"{count / 1e6:.1f} MB"


def number(value: float | None, digits: int = 1) -> str:
    """A figure with thousands separators; a dash where there is none."""
    return "-" if value is None else f"{value:,.{digits}f}"
