"""TurboSparse makes a language model compute only the neurons that fire.

    engine = turbosparse.load("model.gguf")
    print("".join(turbosparse.generate(engine, "Once upon a time")))
    print(turbosparse.analyze(engine, "text.jsonl").mean("h"))

Nothing heavy is imported before one of these is used: neither numpy nor the native module, and torch only for Hugging
Face folders.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from turbosparse.relufy.register import register_when_imported

if TYPE_CHECKING:
    from turbosparse import analyze
    from turbosparse.api import convert, generate, load

__version__ = "0.1.0"
__all__ = ["analyze", "convert", "generate", "load"]

register_when_imported()


def __getattr__(name: str) -> Any:
    if name == "analyze":  # a package that can be called: see there
        return import_module("turbosparse.analyze")
    if name in __all__:
        return getattr(import_module("turbosparse.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
