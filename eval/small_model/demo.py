"""Show what the small model can do: a tool loop, a sum with its reasoning, a needle. Exits with 1 if one is wrong.

PYTHONPATH=eval python -m small_model.demo --base-url http://127.0.0.1:8000/v1

A key, if the server wants one, is read from OPENAI_API_KEY.
"""

import argparse
import random
from collections.abc import Iterable
from typing import Any

from serving_runs.chat import open_client

from small_model.repliers import MAX_TOKENS, Replier
from small_model.score import held_out_chats, is_right
from small_model.tasks import Chat, needle, tool_loop

__all__ = ["streamed"]

_LONGEST_SHOWN = 120


def streamed(base_url: str) -> Replier:
    """As :func:`small_model.repliers.served`, and printed while it streams in."""
    client = open_client(base_url, timeout=900)
    name = client.models.list().data[0].id

    def reply(messages: list[dict[str, Any]], tools: list[dict[str, Any]], thinking: bool) -> dict[str, Any]:
        text = messages[-1]["content"]
        shown = text if len(text) < _LONGEST_SHOWN else f"{text[:60]} [... {len(text):,} letters ...] {text[-60:]}"
        print(f"{messages[-1]['role']}: {' '.join(shown.split())}")
        options: dict[str, Any] = {"tools": tools} if tools else {}
        chunks = client.chat.completions.create(
            model=name,
            messages=messages,
            temperature=0,
            max_tokens=MAX_TOKENS,
            stream=True,
            extra_body={"chat_template_kwargs": {"thinking": thinking}},
            **options,
        )
        return _show(chunks)

    return reply


def _show(chunks: Iterable[Any]) -> dict[str, Any]:
    """Print the chunks, each kind of text under its name; return the message that they make."""
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    calls: list[dict[str, Any]] = []
    kind = None
    for chunk in chunks:
        for choice in chunk.choices:
            for name, piece in _pieces(choice.delta, message, calls):
                print(piece if name == kind else f"{'' if kind is None else chr(10)}  {name}: {piece}", end="")
                kind = name
    print(flush=True)
    return message | ({"tool_calls": calls} if calls else {})


def _pieces(delta: Any, message: dict[str, Any], calls: list[dict[str, Any]]) -> Iterable[tuple[str, str]]:
    """Add a chunk to the message and its calls, and yield its parts."""
    for name in ("reasoning", "content"):
        if piece := getattr(delta, name, None):
            message[name] = message.get(name, "") + piece
            yield name, piece
    for call in delta.tool_calls or []:
        if call.index == len(calls):
            calls.append({"id": call.id, "type": "function", "function": {"name": "", "arguments": ""}})
        function = calls[call.index]["function"]
        for field in ("name", "arguments"):
            if piece := getattr(call.function, field):
                function[field] += piece
                yield f"tool call {call.index}", f"{piece} " if field == "name" else piece


def demo_chats() -> list[tuple[str, Chat]]:
    """What to show, and its title."""
    source = random.Random(3)
    weather = tool_loop(source, "test", city="Hangzhou")
    while not weather.thinking:
        weather = tool_loop(source, "test", city="Hangzhou")
    sums = [chat for chat in held_out_chats("arithmetic", 20) if chat.thinking]
    found = needle(source, "test", 900, lambda line: len(line.split()))
    return [
        ("A tool loop, for a city and a date that it was not trained on", weather),
        ("A sum, with its reasoning", sums[0]),
        ("A needle", found),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", required=True)
    reply = streamed(parser.parse_args().base_url)
    wrong = []
    for title, chat in demo_chats():
        print(f"--- {title}")
        if is_right(chat, reply):
            print("(right)\n")
        else:
            print(f"(wrong; expected {chat.answer!r})\n")
            wrong.append(title)
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
