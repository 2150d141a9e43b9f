"""Rows that bring their own prompt, as text or as chat messages."""

from collections.abc import Mapping
from typing import Any

from vrpo.tasks.data import Row
from vrpo.types import Message

REQUIRED = ("prompt",)


def rows_prompt(row: Row) -> tuple[str | tuple[Message, ...], dict[str, Any]]:
    """(prompt, columns): the `prompt` column, checked, and all other columns as they are."""
    columns = {name: value for name, value in row.values.items() if name != "prompt"}
    value = row.values.get("prompt")
    if isinstance(value, str):
        return row.text("prompt"), columns
    if not isinstance(value, (list, tuple)) or not value:
        raise row.error("prompt", value, "text or a list of chat messages")
    for message in value:
        if (
            not isinstance(message, Mapping)
            or not isinstance(message.get("role"), str)
            or not isinstance(message.get("content"), str)
        ):
            raise row.error("prompt", message, "{'role': <text>, 'content': <text>} for each message")
    return tuple(_message(row, message) for message in value), columns


def _message(row: Row, message: Mapping[Any, Any]) -> Message:
    """The message with all its texts, such as `name`. Data sets of several kinds of messages fill up with null."""
    kept = {key: text for key, text in message.items() if text is not None}
    if not all(isinstance(part, str) for part in (*kept, *kept.values())):
        raise row.error("prompt", message, "a message of texts alone")
    return kept
