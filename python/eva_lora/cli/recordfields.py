"""What a record's fields hold: text, chats, what a chat template is given. Anything else is refused by name."""

import json
import re
from collections.abc import Mapping
from typing import Any

from .datafiles import Place

__all__ = ["chat_of", "kind_of", "template_arguments", "template_variables", "text_of"]

#: What an assistant's message may hold in the place of content.
_INSTEAD_OF_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


def kind_of(record: Mapping[str, Any], text_field: str | None, place: Place) -> tuple[str, str]:
    """Whether records are a "text", a "chat" or a "completion", and the field that holds it."""
    if text_field is not None:
        if text_field not in record:
            raise ValueError(f"text_field: expected a field of text, {text_field!r} is none; fields: {_fields(record)}")
        return "text", text_field
    held = {name: value for name, value in record.items() if value is not None}
    if "messages" in held:
        return "chat", "messages"
    if {"prompt", "completion"} <= set(held):
        return "completion", "completion"
    if "text" in held:
        return "text", "text"
    maybe = [name for name, value in record.items() if value is None or isinstance(value, str)]
    if len(maybe) == 1 and maybe[0] in held and maybe[0] not in ("prompt", "completion"):
        return "text", maybe[0]
    raise ValueError(
        f"data: {place}: expected a field 'text', 'messages', or 'prompt' and 'completion'; pass text_field for "
        f"another. Fields: {_fields(record)}"
    )


def text_of(record: Mapping[str, Any], field: str, place: Place) -> str:
    """The text in a field. Raises ValueError if it is none."""
    text = record.get(field)
    if not isinstance(text, str):
        raise ValueError(
            f"data: {place}: expected text in field {field!r}, got {_shown(text)}. Fields: {_fields(record)}"
        )
    return text


def chat_of(record: Mapping[str, Any], field: str, place: Place) -> list[Any]:
    """The messages in a field. Raises ValueError unless each has a role, and content or something in its place."""
    chat = record.get(field)
    if not isinstance(chat, (list, tuple)) or not chat:
        raise ValueError(
            f"data: {place}: expected a list of messages in field {field!r}, got {_shown(chat)}. "
            f"Fields: {_fields(record)}"
        )
    for number, message in enumerate(chat, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(
                f"data: {place}: expected 'role' and 'content' in message {number} of field {field!r}, "
                f"got {_shown(message)}"
            )
        if not isinstance(message.get("content"), (str, list, tuple, Mapping)) and not (
            message.get("content") is None and any(message.get(name) for name in _INSTEAD_OF_CONTENT)
        ):
            raise ValueError(
                f"data: {place}: expected text as 'content' of message {number} of field {field!r}, "
                f"got {_shown(message.get('content'))}"
            )
    return list(chat)


def template_arguments(record: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """What a chat template is given beside the messages: "tools", and what "chat_template_kwargs" hold."""
    tools, more = record.get("tools"), record.get("chat_template_kwargs")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise ValueError(f"data: {place}: field 'tools' is text, but no JSON: {error}") from error
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise ValueError(f"data: {place}: expected a list of JSON schemas in field 'tools', got {_shown(tools)}")
    if more is not None and not isinstance(more, Mapping):
        raise ValueError(f"data: {place}: expected an object in field 'chat_template_kwargs', got {_shown(more)}")
    return {"tools": tools, **(more or {})}


def template_variables(template: Any) -> set[str]:
    """The names that a chat template, or any of several by name, takes from its caller.

    Raises:
        ValueError: it is no Jinja template.
    """
    import jinja2
    from jinja2 import meta

    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    found: set[str] = set()
    for text in template.values() if isinstance(template, Mapping) else [template]:
        unmarked = re.sub(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}", "", text)
        try:
            found |= meta.find_undeclared_variables(environment.parse(unmarked))
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"chat_template: line {error.lineno}: {error.message}") from error
    return found


def _fields(record: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} (null)" if record[name] is None else name for name in sorted(record))


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
