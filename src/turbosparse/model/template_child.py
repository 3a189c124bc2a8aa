"""Render one chat template: a script of its own, run by chat_template.py in a process with limits.

Reads {"template", "context", "limits"} as JSON from stdin, writes {"text"} or {"error"} to stdout. It imports nothing
but the standard library and jinja2, so that it starts quickly.
"""

import datetime
import json
import sys
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.lexer
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox


class Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} marks the assistant's tokens for training; here it is its body."""

    tags = {"generation"}  # noqa: RUF012, the attribute is jinja2's

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class RefusedError(Exception):
    """The template itself called raise_exception."""


def raise_exception(message: object) -> NoReturn:
    raise RefusedError(str(message))


def to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # jinja2's own filter escapes for HTML, which would change the prompt.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def strftime_now(format_: str) -> str:
    return datetime.datetime.now().strftime(format_)


def limit_resources(seconds: int, memory: int) -> None:
    """The last wall, should a template get out of the sandbox: no writing, little memory, little time."""
    try:
        import resource
    except ImportError:  # not on Windows: there the parent's time limit alone holds
        return
    limits = [(resource.RLIMIT_CPU, seconds), (resource.RLIMIT_FSIZE, 0)]
    if sys.platform == "linux":
        limits.append((resource.RLIMIT_AS, memory))
    for kind, value in limits:
        resource.setrlimit(kind, (value, value))


def render(template: str, context: dict[str, Any], max_characters: int) -> str:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    parts: list[str] = []
    size = 0
    for part in environment.from_string(template).generate(**context):
        size += len(part)
        if size > max_characters:
            raise RefusedError(f"it writes more than {max_characters} characters")
        parts.append(part)
    return "".join(parts)


def main() -> None:
    request = json.load(sys.stdin)
    limits = request["limits"]
    limit_resources(limits["seconds"], limits["memory"])
    try:
        answer = {"text": render(request["template"], request["context"], limits["characters"])}
    except MemoryError:
        answer = {"error": "it needs too much memory"}
    except RecursionError:
        answer = {"error": "it is nested too deeply"}
    except Exception as error:  # whatever a hostile template brings about
        answer = {"error": str(error) or type(error).__name__}
    json.dump(answer, sys.stdout)


main()
