"""What a conversation is, and the form in which one travels from its file to the template."""

import json
from typing import Any

ROLES = ("system", "user", "assistant", "tool")


def checked(messages: Any, tools: Any) -> str:
    """Returns a conversation as JSON: {"messages": [...], "tools": ...}.

    Each message is an object with a "role", one of ROLES, and a "content", a text or a list of parts
    {"type": "text", "text": ...}, which are joined; an assistant that calls tools may have none. Everything
    else in it is for the template. Raises ValueError, with one line, for anything else, and if the assistant
    says nothing.
    """
    if type(messages) is not list:
        raise ValueError(f"the messages are {'missing' if messages is None else 'no list'}")
    if not messages:
        raise ValueError("the conversation is empty")
    if tools is not None and type(tools) is not list:
        raise ValueError("the tools are no list")
    known = [_message(number, message) for number, message in enumerate(messages, start=1)]
    if all(message["role"] != "assistant" for message in known):
        raise ValueError("no message is the assistant's: there is nothing to learn from the conversation")
    return json.dumps({"messages": known, "tools": tools}, ensure_ascii=False)


def _message(number: int, message: Any) -> dict:
    if type(message) is not dict:
        raise ValueError(f"message {number} is no object with role and content")
    known = {key: value for key, value in message.items() if value is not None}
    role, content = known.get("role"), known.get("content")
    if role not in ROLES:
        raise ValueError(f"message {number} has the role {role!r}, which is none of {', '.join(ROLES)}")
    if type(content) is list:
        texts: list[Any] = [
            part.get("text") if type(part) is dict and part.get("type") == "text" else None
            for part in content
        ]
        content = known["content"] = "".join(texts) if all(type(text) is str for text in texts) else None
    if type(content) is not str and not (content is None and "content" not in known and _calls(known)):
        raise ValueError(f"message {number} ({role}) has a content that is no text, and no list of texts")
    return known


def _calls(message: dict) -> bool:
    return message["role"] == "assistant" and bool(message.get("tool_calls"))
