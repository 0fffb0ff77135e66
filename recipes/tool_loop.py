"""Asks a served DeepSeek-V3.2 two questions that it answers by calling tools, thinking in between.

    python recipes/tool_loop.py --base-url http://127.0.0.1:8000/v1 --model NAME

The tools are stand-ins. Within a question the model gets back what it thought before its calls, so it goes on
where it was. With the next question these thoughts are cleared: the prompt no longer holds them anyway.
A key, if the server wants one, is read from OPENAI_API_KEY.
"""

import argparse
import json
import os
from typing import Any

from openai import OpenAI

QUESTIONS = ("How is the weather in Hangzhou tomorrow?", "And in Beijing?")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_date",
            "description": "Today's date.",
            "parameters": {"type": "object", "properties": {}},
        },
    },
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a city on a day.",
            "parameters": {
                "type": "object",
                "properties": {
                    "location": {"type": "string", "description": "The city"},
                    "date": {"type": "string", "description": "The day, as YYYY-mm-dd"},
                },
                "required": ["location", "date"],
            },
        },
    },
]
# A model that never stops calling tools is stopped here.
MAX_REPLIES = 10


def get_date() -> str:
    return "2025-12-01"


def get_weather(location: str, date: str) -> str:
    return f"{location}, {date}: cloudy, 7~13°C"


FUNCTIONS = {"get_date": get_date, "get_weather": get_weather}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", required=True, help="the name that /v1/models shows")
    parser.add_argument("--max-tokens", type=int, help="of a reply; one that is cut there ends the run")
    arguments = parser.parse_args()
    client = OpenAI(base_url=arguments.base_url, api_key=os.environ.get("OPENAI_API_KEY") or "none")
    history: list[dict[str, Any]] = []
    for number, question in enumerate(QUESTIONS, 1):
        print(f"Question {number}: {question}\n")
        clear_reasoning(history)
        history.append({"role": "user", "content": question})
        answer(client, arguments.model, history, number, arguments.max_tokens)


def answer(client: OpenAI, model: str, history: list[dict[str, Any]], number: int, max_tokens: int | None) -> None:
    """Have the model reply, and run what it calls, until it calls nothing more; `history` grows."""
    for round_number in range(1, MAX_REPLIES + 1):
        completion = client.chat.completions.create(
            model=model,
            messages=history,
            max_tokens=max_tokens,
            tools=TOOLS,
            extra_body={"chat_template_kwargs": {"thinking": True}},
        )
        choice = completion.choices[0]
        message = choice.message
        reasoning = getattr(message, "reasoning", None)
        calls = message.tool_calls or []
        print(f"Turn {number}.{round_number}")
        print(f"  reasoning: {reasoning}")
        print(f"  content: {message.content}")
        if choice.finish_reason == "length":
            raise SystemExit("tool_loop: a reply was cut: raise --max-tokens, or the server's --max-model-len")
        if not calls and not message.content:
            raise SystemExit("tool_loop: a reply has neither content nor calls: a model with trained weights?")
        reply = {"role": "assistant", "content": message.content, "reasoning": reasoning}
        if calls:
            reply["tool_calls"] = [call.model_dump() for call in calls]
        history.append(reply)
        for call in calls:
            result = run(call.function.name, call.function.arguments)
            print(f"  {call.function.name} {call.function.arguments} -> {result}")
            history.append({"role": "tool", "tool_call_id": call.id, "content": result})
        print()
        if not calls:
            return
    raise SystemExit(f"tool_loop: no answer within {MAX_REPLIES} replies")


def run(name: str, arguments: str) -> str:
    """The tool's result. What is wrong with a call is for the model to read and to mend."""
    try:
        return FUNCTIONS[name](**json.loads(arguments))
    except (KeyError, TypeError, ValueError) as error:
        return f"error: {name}({arguments}): {error!r}"


def clear_reasoning(history: list[dict[str, Any]]) -> None:
    for message in history:
        message.pop("reasoning", None)


if __name__ == "__main__":
    main()
