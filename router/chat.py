"""Renders chat messages into a prompt with the model's own Jinja template, as Hugging Face does, in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from router.validation import show
from tandem.errors import InvalidRequest

ROLES = ("system", "developer", "user", "assistant", "tool")
MESSAGES_MAX = 4096


class ChatTemplate:
    """A compiled chat template and the special tokens that it may name.

    The environment is that of transformers (trim_blocks, lstrip_blocks, loop controls, `raise_exception`,
    `strftime_now`, a `tojson` that leaves HTML alone, the `generation` block), so that templates written for it work.

    Raises:
        ValueError: the template does not compile.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template does not compile: {error}") from error

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """The prompt text for `messages`, each with `role` and `content`.

        Raises:
            InvalidRequest: the template refuses the messages (an order of roles it does not know, for instance).
        """
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, ArithmeticError) as error:
            raise InvalidRequest("messages", f"the model's chat template refuses them: {error}") from error


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks what the assistant wrote, for training: here only its body."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares it)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def check_num_messages(num_messages: int) -> None:
    """Raises InvalidRequest unless there is something to answer, and not too much of it."""
    if not 1 <= num_messages <= MESSAGES_MAX:
        raise InvalidRequest("messages", f"has {num_messages} messages, must have 1 to {MESSAGES_MAX}")


def check_role(role: str, field: str) -> str:
    """The role as templates know it: `developer` is what OpenAI now calls the system.

    Raises:
        InvalidRequest: naming `field`, when there is no such role.
    """
    if role not in ROLES:
        raise InvalidRequest(field, f"is {role[:60]!r}, must be one of {', '.join(ROLES)}")
    return "system" if role == "developer" else role


def text_of_content(content: object, field: str) -> str:
    """The text of a message's content: a string, or a list of parts {"type": "text", "text": ...} joined.

    Raises:
        InvalidRequest: naming `field`, when a part is not text.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(field, f"is a {type(content).__name__}, must be a string or a list of text parts")
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(text, str):
            raise InvalidRequest(f"{field}.{number}", f"a part of type {show(kind)} is not supported, only 'text'")
        texts.append(text)
    return "".join(texts)
