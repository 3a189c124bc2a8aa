"""TurboSparse makes a language model compute only the neurons that fire."""

from turbosparse.relufy.register import register_when_imported

__version__ = "0.1.0"

register_when_imported()
