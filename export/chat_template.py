"""Rendering a Jinja chat template as transformers does (``apply_chat_template``)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NoReturn

from export.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Sequence


class TemplateRefusal(Exception):  # noqa: N818 - a template's answer, handled where it is asked
    """The template raised an error for a conversation."""


class ChatTemplate:
    """A compiled chat template.

    The environment is the one of transformers: sandboxed, blocks trimmed, ``raise_exception``, ``tojson`` without
    HTML escapes, loop controls, ``{% generation %}``. ``strftime_now`` is left out on purpose: a prompt that begins
    with the clock is another prompt every day, and no prefix of it can be kept. Templates test for it.

    Raises:
        ExportError: the template is not valid Jinja.
    """

    def __init__(self, source: str, bos_token: str, eos_token: str) -> None:
        import jinja2

        self._bos_token = bos_token
        self._eos_token = eos_token
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ExportError(f"the chat template is not valid Jinja: {error}") from None

    def render(self, conversation: Sequence[tuple[str, str]], *, generation_prompt: bool = False) -> str:
        """Render (role, content) pairs. Raises ``TemplateRefusal`` if the template raises an error."""
        messages = [{"role": role, "content": content} for role, content in conversation]
        try:
            text: str = self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                bos_token=self._bos_token,
                eos_token=self._eos_token,
                add_generation_prompt=generation_prompt,
            )
            return text
        except Exception as error:
            raise TemplateRefusal(str(error)) from None


def _environment() -> Any:
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationBlock(Extension):
        """``{% generation %}`` marks the assistant's words for training; here it renders its content."""

        tags = {"generation"}  # noqa: RUF012 - jinja2's own interface

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(value: object, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **options})

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment
