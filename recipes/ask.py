"""Asks a served model one question that it has to answer by calling a tool, and prints what streams back.

python recipes/ask.py --base-url http://127.0.0.1:8000/v1 --model NAME
"""

import argparse
from collections.abc import Iterable
from typing import Any

from openai import OpenAI

QUESTION = "What is the weather in Berlin?"
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather of a city.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Berlin", "Paris"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--max-tokens", type=int, default=256)
    arguments = parser.parse_args()
    client = OpenAI(base_url=arguments.base_url, api_key="none", max_retries=0, timeout=120)
    print(f"Question: {QUESTION}  (to be answered by a call of get_weather)")
    stream = client.chat.completions.create(
        model=arguments.model,
        messages=[{"role": "user", "content": QUESTION}],
        tools=[TOOL],
        # The server then holds the model to calls that fit the schema, so that even random weights make one.
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=arguments.max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    if "tool call 0" not in show(stream):
        raise SystemExit("ask: expected a tool call, and none came; the server's log may say why")


def show(stream: Iterable[Any]) -> set[str]:
    """Print the chunks, each kind of text under its name; return the kinds."""
    kinds: set[str] = set()
    kind, finish_reason, usage = None, None, None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            finish_reason = choice.finish_reason or finish_reason
            for name, text in pieces(choice.delta):
                if name != kind:
                    print(f"\n{name}: " if kind else f"{name}: ", end="")
                    kind = name
                    kinds.add(name)
                print(printable(text), end="", flush=True)
    print(f"\nfinish reason: {finish_reason}")
    if usage:
        print(f"tokens: {usage.prompt_tokens} in, {usage.completion_tokens} out")
    return kinds


def pieces(delta: Any) -> Iterable[tuple[str, str]]:
    """Yield what a chunk adds, as kind and text."""
    if text := getattr(delta, "reasoning", None):
        yield "reasoning", text
    if delta.content:
        yield "content", delta.content
    for call in delta.tool_calls or []:
        if call.function.name:
            yield f"tool call {call.index}", f"{call.function.name} "
        if call.function.arguments:
            yield f"tool call {call.index}", call.function.arguments


def printable(text: str) -> str:
    """Spell out control characters, which could upset a terminal."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


if __name__ == "__main__":
    main()
