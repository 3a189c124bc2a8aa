"""The one exception that a user is meant to see."""


class UserError(Exception):
    """What the user gave cannot work.

    The message is one clear sentence that names the file, tensor or option and the remedy. The command line prints it
    without a traceback and exits with code 2; library users catch it.
    """
