"""Teach transformers' Auto classes our model types, without importing torch or transformers to do it.

`import turbosparse` sets a hook: once transformers' table of configs is imported, a look-up of a `turbosparse_*` type
in it first brings in drelu.py. Waiting for the look-up and not only for the import keeps AutoTokenizer as light as it
was, and avoids importing model code in the middle of transformers' own circular imports. wrapt, which does the hooking
and takes longer to import than a small model takes to load, is left until transformers is on its way.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PREFIX = "turbosparse_"
_TABLE = "transformers.models.auto.configuration_auto"
_registered = False


def register_when_imported() -> None:
    """Set the hook; acts at once if transformers' Auto classes are already imported."""
    if _TABLE in sys.modules:
        _watch_look_ups(sys.modules[_TABLE])
    else:
        sys.meta_path.insert(0, _Watch())


class _Watch:
    """A finder that finds nothing, but notices that the table is looked for."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _TABLE:
            return None
        import wrapt

        sys.meta_path.remove(self)
        wrapt.register_post_import_hook(_watch_look_ups, _TABLE)
        return importlib.util.find_spec(name)  # past this finder, to the one that wrapt has just put there


def _watch_look_ups(configuration_auto: ModuleType) -> None:
    import wrapt

    table = type(configuration_auto.CONFIG_MAPPING)
    for method in ("__contains__", "__getitem__"):
        wrapt.wrap_function_wrapper(table, method, _look_up)


def _look_up(wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if args and isinstance(args[0], str) and args[0].startswith(PREFIX):
        register()
    return wrapped(*args, **kwargs)


def register() -> None:
    """Register every `turbosparse_*` config and model with AutoConfig and AutoModelForCausalLM, once."""
    global _registered
    if _registered:
        return
    from transformers import AutoConfig, AutoModelForCausalLM

    from turbosparse.relufy.drelu import FAMILIES

    _registered = True
    for config, model in FAMILIES.values():
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)
