"""OpenAI chat messages, read and checked: each becomes a `Turn` or raises a `MessageError`.

Nothing of the caller's is modified: a turn holds what it reads in new containers.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

from vllm_dsv32.errors import MessageError

ROLES: Final = ("system", "developer", "user", "assistant", "tool")

# Content parts that are text, and the key that holds it.
_TEXT_PARTS: Final = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
}
_THINKING_PART: Final = "thinking"
# How vLLM joins the text parts of one message.
_PART_SEPARATOR: Final = "\n"


class ToolCall(NamedTuple):
    """One call that the assistant made."""

    id: str | None
    name: str
    arguments: dict[str, Any]


class Turn(NamedTuple):
    """One message, checked. Keys that its role does not have are empty."""

    role: str
    text: str
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    call_id: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    response_format: Any = None
    prefix: bool = False


def error(index: int, reason: str) -> MessageError:
    """The error for the message at `index`; its text is what the client reads."""
    return MessageError(f"messages[{index}]: {reason}")


def is_unicode(text: str) -> bool:
    """Whether the text can be encoded: JSON's escapes can spell half of a surrogate pair."""
    if text.isascii():
        return True
    try:
        # Any encoding refuses half of a pair; this one is the fastest at it.
        text.encode("utf-16-le")
    except UnicodeEncodeError:
        return False
    return True


def read_message(index: int, message: Mapping[str, Any]) -> Turn:
    """Check one message and return it as a `Turn`.

    `reasoning` (vLLM's key) and `reasoning_content` (DeepSeek's) are both read; the former wins.

    Raises:
        MessageError: the message has no rendering, whatever stands around it.
    """
    if not isinstance(message, Mapping):
        raise error(index, f"expected an object, got {type(message).__name__}")
    role = message.get("role")
    if role not in ROLES:
        raise error(index, f"unknown role {role!r}, expected one of {', '.join(ROLES)}")
    text, thoughts = _read_content(index, message.get("content"))
    match role:
        case "assistant":
            return Turn(
                role,
                text,
                reasoning=_read_reasoning(index, message) or thoughts,
                calls=_read_calls(index, message.get("tool_calls")),
                prefix=bool(message.get("prefix")),
            )
        case "tool":
            call_id = message.get("tool_call_id")
            if not isinstance(call_id, str) or not call_id:
                raise error(index, f"a tool message needs the tool_call_id it answers, got {call_id!r}")
            return Turn(role, text, call_id=call_id)
        case "system" | "developer":
            if role == "developer" and not text:
                raise error(index, "a developer message needs content")
            return Turn(
                role,
                text,
                tools=read_tools(message.get("tools"), f"messages[{index}].tools"),
                response_format=message.get("response_format"),
            )
        case _:
            return Turn(role, text)


def read_text(message: Mapping[str, Any]) -> str:
    """The text of a message that `read_message` accepts, without reading the rest of it."""
    return _read_content(0, message.get("content"))[0]


def read_tools(tools: Iterable[Any] | None, where: str = "tools") -> tuple[Mapping[str, Any], ...]:
    """The function definitions of OpenAI's `tools`, less the keys the client left unset.

    Raises:
        MessageError: an entry is not `{"type": "function", "function": {"name": ..., ...}}`.
    """
    functions: list[Mapping[str, Any]] = []
    for position, tool in enumerate(tools or ()):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            expected = '{"type": "function", "function": {"name": ...}}'
            raise MessageError(f"{where}[{position}]: expected {expected}, got {tool!r:.100}")
        functions.append({key: value for key, value in function.items() if value is not None})
    return tuple(functions)


def _read_content(index: int, content: object) -> tuple[str, str]:
    """The text of a message, and the text of its thinking parts."""
    if content is None:
        return "", ""
    if isinstance(content, str):
        return content, ""
    if not isinstance(content, Iterable) or isinstance(content, (Mapping, bytes)):
        raise error(index, f"content must be a string or a list of parts, got {type(content).__name__}")
    texts: list[str] = []
    thoughts: list[str] = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind == _THINKING_PART:
            value, target = part.get(_THINKING_PART), thoughts
        elif kind in _TEXT_PARTS:
            value, target = part.get(_TEXT_PARTS[kind]), texts
        else:
            raise error(index, f"content part of type {kind!r}: DeepSeek-V3.2 reads text only")
        if not isinstance(value, str | None):
            raise error(index, f"content part {kind!r} must hold a string, got {type(value).__name__}")
        if value is not None:
            target.append(value)
    return _PART_SEPARATOR.join(texts), _PART_SEPARATOR.join(thoughts)


def _read_reasoning(index: int, message: Mapping[str, Any]) -> str:
    for key in ("reasoning", "reasoning_content"):
        value = message.get(key)
        if value is None:
            continue
        if not isinstance(value, str):
            raise error(index, f"{key} must be a string, got {type(value).__name__}")
        return value
    return ""


def _read_calls(index: int, calls: Iterable[Any] | None) -> tuple[ToolCall, ...]:
    read: list[ToolCall] = []
    for position, call in enumerate(calls or ()):
        where = f"tool_calls[{position}]"
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or call.get("type", "function") != "function":
            raise error(index, f"{where} is not a call of a function")
        name = function.get("name")
        if not isinstance(name, str) or not name:
            raise error(index, f"{where}.function.name must be a string, got {name!r}")
        call_id = call.get("id")
        if call_id is not None and any(call_id == other.id for other in read):
            raise error(index, f"{where}.id {call_id!r} stands twice in this message")
        arguments = _read_arguments(index, where, function.get("arguments"))
        read.append(ToolCall(call_id, name, arguments))
    return tuple(read)


def _read_arguments(index: int, where: str, arguments: object) -> dict[str, Any]:
    """The arguments as a dict, from OpenAI's JSON text or from a mapping; nothing at all is no arguments."""
    if arguments is None or arguments == "":
        return {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as cause:
            raise error(index, f"{where}.function.arguments is not JSON: {cause}") from cause
    if not isinstance(arguments, Mapping):
        got = type(arguments).__name__
        raise error(index, f"{where}.function.arguments must be a JSON object, got {got}")
    return dict(arguments)
