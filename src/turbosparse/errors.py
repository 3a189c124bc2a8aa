"""The one exception that a user is meant to see, and what it may quote of others."""


class UserError(Exception):
    """What the user gave cannot work.

    The message is one clear sentence that names the file, tensor or option and the remedy. The command line prints it
    without a traceback and exits with code 2; library users catch it.
    """


def reason(error: Exception) -> str:
    """What another library's exception says, short enough for a sentence: its first line, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
