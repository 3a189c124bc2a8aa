"""The command line: `turbosparse <stage>`, one thin file per stage.

Importing this package loads typer and nothing heavy; every stage imports what it runs inside its function, so that
`turbosparse --help` answers at once and a run-time command never loads torch.
"""

import gc
import io
import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line of this process and exit.

    Exit codes: 0 done, 2 a mistake in the input or the options, 130 stopped with Ctrl-C; a traceback is a bug.
    """
    gc.set_threshold(50_000)  # the default looks for garbage hundreds of times while a vocabulary is read
    from turbosparse.cli.app import app

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows ?, and the text goes on
    app(prog_name="turbosparse")
