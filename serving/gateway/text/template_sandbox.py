"""Jinja2 for chat templates, as Hugging Face configures it, with limits on time and size.

A template comes with the model, so it is no user's text; but it computes on users' text, and a bad one must not
stop a gateway. Immutable sandbox, a deadline looked at in every turn of every loop, sizes of products bounded.
"""

from __future__ import annotations

import datetime
import json
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

RENDER_TIMEOUT_S = 1.0
MAX_POWER = 1024
_TICK = "__argosy_tick"
_WIDE = re.compile(r"%[^a-zA-Z%]*(?:[0-9]{4}|\*)")


class TemplateLimitError(jinja2.TemplateError):
    """A rendering that takes too long or becomes too large."""


class SandboxedTemplate:
    """A compiled chat template. Thread-safe."""

    def __init__(self, source: str, max_bytes: int, now: Callable[[], datetime.datetime]) -> None:
        """max_bytes: of the rendered prompt. now: the clock of `strftime_now`.

        Raises jinja2.TemplateError when the source does not compile.
        """
        self._max_bytes = max_bytes
        environment = _Environment(max_bytes)
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda pattern: now().strftime(pattern)
        self._template = environment.from_string(source)

    def render(self, variables: Mapping[str, Any], timeout_s: float = RENDER_TIMEOUT_S) -> str:
        """Raises jinja2.TemplateError (of which TemplateLimitError) and whatever a wrong template provokes."""
        deadline = time.monotonic() + timeout_s

        def tick() -> None:
            if time.monotonic() > deadline:
                raise TemplateLimitError(f"the chat template takes longer than {timeout_s:g} s")

        pieces: list[str] = []
        size = 0
        for piece in self._template.generate({**variables, _TICK: tick}):
            tick()
            size += len(piece)
            if size > self._max_bytes:
                raise TemplateLimitError(f"the messages become more than {self._max_bytes} bytes of prompt")
            pieces.append(piece)
        return "".join(pieces)


class _GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's text for training; here it is just its body."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self, max_size: int) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag])
        self._max_size = max_size

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Every turn of a loop begins by looking at the clock."""
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            call = nodes.Call(nodes.Name(_TICK, "load"), [], [], None, None)
            loop.body.insert(0, nodes.ExprStmt(call).set_lineno(loop.lineno))
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*" and not (isinstance(left, int | float) and isinstance(right, int | float)):
            counts = [value for value in (left, right) if isinstance(value, int)]
            sizes = [len(value) for value in (left, right) if hasattr(value, "__len__")]
            if counts and sizes and counts[0] * sizes[0] > self._max_size:
                raise TemplateLimitError("the chat template repeats a value too often")
        if operator == "**" and (abs(left) > MAX_POWER or abs(right) > MAX_POWER):
            raise TemplateLimitError(f"the chat template raises a number above {MAX_POWER} to a power")
        if operator == "%" and isinstance(left, str) and _WIDE.search(left):
            raise TemplateLimitError("the chat template formats with a width above 999")
        return super().call_binop(context, operator, left, right)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja2's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
