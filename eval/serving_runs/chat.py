"""Chats with any server of the OpenAI API, whole or streamed, and what each of its messages is."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from openai import OpenAI

__all__ = ["Chat", "Reply", "StreamError", "collected", "open_client"]


class StreamError(Exception):
    """The pieces of a stream do not make a message."""


@dataclass(frozen=True)
class Reply:
    """One reply of a server."""

    message: dict[str, Any]
    """As it goes into the history."""
    finish_reason: str | None
    num_prompt_tokens: int | None
    """As the server counts; None if it does not say."""

    @property
    def content(self) -> str:
        return self.message.get("content") or ""

    @property
    def calls(self) -> list[dict[str, str]]:
        """Name and arguments, as the server gave them, of each call."""
        return [call["function"] for call in self.message.get("tool_calls") or []]


def open_client(base_url: str, *, timeout: float) -> OpenAI:
    """A client that does not ask twice; its key is OPENAI_API_KEY, if that is set.

    Args:
        base_url: such as ``http://127.0.0.1:8000/v1``.
        timeout: seconds that one reply may take.
    """
    # Servers without keys take any, but the client wants one.
    key = os.environ.get("OPENAI_API_KEY") or "none"
    return OpenAI(base_url=base_url, api_key=key, max_retries=0, timeout=timeout)


class Chat:
    """A served model that is asked at temperature 0."""

    def __init__(self, base_url: str, model: str, *, timeout: float = 3600) -> None:
        """Args:
        base_url: such as ``http://127.0.0.1:8000/v1``.
        model: the name it is served under.
        timeout: seconds that one reply may take.
        """
        self._client = open_client(base_url, timeout=timeout)
        self.base_url = base_url
        self.model = model

    def reply(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        *,
        max_tokens: int,
        thinking: bool = False,
        stream: bool = False,
    ) -> Reply:
        """The assistant's next message.

        Raises:
            StreamError: see there.
            openai.OpenAIError: the server refused, or was not there.
            httpx.HTTPError: the same once a stream has begun.
        """
        options: dict[str, Any] = {"tools": tools} if tools else {}
        if stream:
            options["stream_options"] = {"include_usage": True}
        answer = self._client.chat.completions.create(
            model=self.model,
            messages=messages,
            temperature=0,
            max_tokens=max_tokens,
            stream=stream,
            extra_body={"chat_template_kwargs": {"thinking": thinking}},
            **options,
        )
        if stream:
            return collected(answer)
        choice = answer.choices[0]
        message = choice.message.model_dump(exclude_none=True)
        return Reply(message, choice.finish_reason, answer.usage.prompt_tokens if answer.usage else None)


def collected(chunks: Iterable[Any]) -> Reply:
    """The reply that a stream makes.

    Raises:
        StreamError: a call before the one it follows, a second id for a call, or no finish reason.
    """
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    calls: list[dict[str, Any]] = []
    finish_reason, num_prompt_tokens = None, None
    for chunk in chunks:
        num_prompt_tokens = chunk.usage.prompt_tokens if chunk.usage else num_prompt_tokens
        for choice in chunk.choices:
            finish_reason = choice.finish_reason or finish_reason
            for name in ("reasoning", "content"):
                message[name] = message.get(name, "") + (getattr(choice.delta, name, None) or "")
            for piece in choice.delta.tool_calls or []:
                _add(piece, calls)
    if finish_reason is None:
        raise StreamError("the stream ended without a finish reason")
    if not message["reasoning"]:
        del message["reasoning"]
    return Reply(message | ({"tool_calls": calls} if calls else {}), finish_reason, num_prompt_tokens)


def _add(piece: Any, calls: list[dict[str, Any]]) -> None:
    if piece.index == len(calls):
        calls.append({"id": piece.id, "type": "function", "function": {"name": "", "arguments": ""}})
    elif piece.index > len(calls):
        raise StreamError(f"a piece of call {piece.index} came before call {len(calls)} began")
    elif piece.id not in (None, calls[piece.index]["id"]):
        raise StreamError(f"call {piece.index} has the ids {calls[piece.index]['id']} and {piece.id}")
    for name in ("name", "arguments"):
        calls[piece.index]["function"][name] += getattr(piece.function, name, None) or ""
