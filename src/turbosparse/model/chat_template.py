"""Chat templates: programs that come inside a model file, so they are run like programs from a stranger.

A template is rendered with jinja2's immutable sandbox in a child process that has limits on time, memory and output.
The helpers are those that transformers gives to templates (huggingface.co/docs/transformers/chat_templating).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from turbosparse.errors import UserError

MAX_SECONDS = 5
MAX_MEMORY_BYTES = 1 << 30
MAX_CHARACTERS = 1 << 20
_MESSAGE_CHARACTERS = 200


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tokens: Mapping[str, str] | None = None,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """The prompt that a template makes of a conversation.

    Args:
        template: Jinja source.
        messages: {"role": ..., "content": ...} each; must be JSON.
        tokens: {"bos_token": "<s>", ...}, for the template to use.
        add_generation_prompt: end with the start of the assistant's answer.
        tools: function schemas, or None.

    Raises:
        UserError: the template is not valid, refuses the messages, tries what the sandbox forbids, or goes past
            MAX_SECONDS, MAX_MEMORY_BYTES or MAX_CHARACTERS.
    """
    context = {
        **(tokens or {}),
        "messages": list(messages),
        "add_generation_prompt": add_generation_prompt,
        "tools": tools,
    }
    limits = {"seconds": MAX_SECONDS, "memory": MAX_MEMORY_BYTES, "characters": MAX_CHARACTERS}
    request = json.dumps({"template": template, "context": context, "limits": limits})
    try:
        child = subprocess.run(_command(), input=request.encode(), capture_output=True, timeout=MAX_SECONDS)
    except subprocess.TimeoutExpired:
        _fail(f"it does not end within {MAX_SECONDS} seconds")
    try:
        answer = json.loads(child.stdout)
    except ValueError:
        _fail(f"it was stopped at its limits of time and memory (status {child.returncode})")
    if "text" not in answer:
        _fail(str(answer.get("error")))
    return str(answer["text"])


def _command() -> list[str]:
    """Isolated, and without `site`: start-up hooks of an environment would cost more than the rendering."""
    import jinja2
    import markupsafe

    roots = {str(Path(module.__file__).parent.parent) for module in (jinja2, markupsafe) if module.__file__}
    script = Path(__file__).with_name("template_child.py")
    start = f"import sys, runpy; sys.path += {sorted(roots)!r}; runpy.run_path({str(script)!r})"
    return [sys.executable, "-I", "-S", "-c", start]


def _fail(reason: str) -> NoReturn:
    reason = "".join(c if c.isprintable() else " " for c in reason[:_MESSAGE_CHARACTERS]).strip(" .")
    raise UserError(f"The model's chat template failed: {reason}; continue raw text with `turbosparse run` instead.")
