"""Teach transformers' Auto classes our model types, without importing torch or transformers to do it.

`import turbosparse` sets a hook: once transformers' table of configs is imported, a look-up of a `turbosparse_*` type
in it first brings in drelu.py. Waiting for the look-up and not only for the import keeps AutoTokenizer as light as it
was, and avoids importing model code in the middle of transformers' own circular imports.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import wrapt

PREFIX = "turbosparse_"
_registered = False


def register_when_imported() -> None:
    """Set the hook; acts at once if transformers' Auto classes are already imported."""
    wrapt.register_post_import_hook(_watch_look_ups, "transformers.models.auto.configuration_auto")


def _watch_look_ups(configuration_auto: ModuleType) -> None:
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
