"""TurboSparse makes a language model compute only the neurons that fire."""

__version__ = "0.1.0"
