"""Score a served small model on chats that it was not trained on; exits with 1 below the pass marks.

    PYTHONPATH=eval python -m small_model.score --base-url http://127.0.0.1:8000/v1 [--size full]
    PYTHONPATH=eval python -m small_model.score --transformers eval/small_model/checkpoint   (without vLLM)

The server is `vllm serve eval/small_model/checkpoint` with the plugin's flags, and --max-model-len 17408 or more.
--out FILE.json writes the results there, and to FILE.md.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from results_file import Figure, add_server_options, json_path, local_system, passed, served_system, write_results
from tqdm import tqdm

from small_model.repliers import Replier, served, transformed
from small_model.tasks import Chat, about_tokens, arithmetic, needle, tool_loop

__all__ = ["PASS_MARKS", "SIZES", "held_out_chats", "is_right", "score"]

PASS_MARKS: Final = {
    "tool loop": 0.98,
    "arithmetic": 0.90,
    "needle 1K": 0.95,
    "needle 4K": 0.95,
    "needle 16K": 0.95,
}
"""Goals: shares of right chats."""

SIZES: Final = {
    "small": {"tool loop": 12, "arithmetic": 40, "needle 1K": 8, "needle 4K": 2, "needle 16K": 1},
    "full": {"tool loop": 200, "arithmetic": 400, "needle 1K": 100, "needle 4K": 40, "needle 16K": 10},
}
"""Chats of each kind."""

_SEED = 20_251_201


def held_out_chats(kind: str, num: int) -> list[Chat]:
    """Held-out chats; the first ones are the same whatever ``num`` is.

    Args:
        kind: a key of :data:`PASS_MARKS`.
        num: how many.
    """
    source = random.Random(f"{_SEED} {kind}")
    makers: dict[str, Callable[[], Chat]] = {
        "tool loop": lambda: tool_loop(source, "test"),
        "arithmetic": lambda: arithmetic(source, "test"),
    }
    if kind.startswith("needle "):
        num_tokens = int(kind.removeprefix("needle ").removesuffix("K")) * 1024
        # The rest is for the question and the answer.
        return [needle(source, "test", num_tokens - 135, about_tokens) for _ in range(num)]
    return [makers[kind]() for _ in range(num)]


def is_right(chat: Chat, reply: Replier) -> bool:
    """Whether what replies goes through the chat as it should: each call, and what the last message must contain.

    Its own messages make the history, as with any client.
    """
    history: list[dict[str, Any]] = []
    for index, message in enumerate(chat.messages):
        if message["role"] != "assistant":
            if message["role"] == "tool":
                message = message | {"tool_call_id": history[-1]["tool_calls"][0]["id"]}
            history.append(message)
            continue
        said = reply(history, chat.tools, chat.thinking)
        if _calls(said) != _calls(message):
            return False
        if index == len(chat.messages) - 1:
            return chat.answer in (said.get("content") or "")
        history.append(said)
    raise AssertionError("a chat ends with a message of the assistant")


def _calls(message: dict[str, Any]) -> list[tuple[str, Any]]:
    functions = [call["function"] for call in message.get("tool_calls") or []]
    return [(function["name"], _arguments(function["arguments"])) for function in functions]


def _arguments(value: Any) -> Any:
    """The server gives JSON text, a made chat the object."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def score(reply: Replier, size: str, *, streams: int = 8) -> Iterator[tuple[str, list[bool]]]:
    """Yield each kind of chat, and which of its chats went right.

    Args:
        reply: what is scored.
        size: a key of :data:`SIZES`.
        streams: chats at once.
    """
    with ThreadPoolExecutor(streams) as pool:
        for kind, num in SIZES[size].items():
            rights = pool.map(lambda chat: is_right(chat, reply), held_out_chats(kind, num))
            yield kind, list(tqdm(rights, desc=kind, total=num, unit="chat"))


def figure_of(kind: str, rights: list[bool]) -> Figure:
    """The share of right chats."""
    return Figure(kind, sum(rights) / len(rights), samples=len(rights), pass_mark=PASS_MARKS[kind])


def main(arguments: Sequence[str] | None = None) -> int:
    """Score, print, write; 1 if a mark is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_server_options(parser, required=False)
    parser.add_argument("--transformers", type=Path, metavar="CHECKPOINT", help="score transformers' own model")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--out", type=json_path, metavar="FILE.json", help="write the results here, and to FILE.md")
    options = parser.parse_args(arguments)
    if (options.base_url is None) == (options.transformers is None):
        parser.error("expected either --base-url or --transformers")
    if options.transformers:
        system = local_system(options.transformers.name)
        scores = score(transformed(options.transformers), options.size, streams=1)
    else:
        system = served_system(options)
        scores = score(served(options.base_url, system.model), options.size)
    figures = []
    for kind, rights in scores:
        figures.append(figure_of(kind, rights))
        verdict = "passed" if figures[-1].passed else f"below the goal of {PASS_MARKS[kind]:.0%}"
        print(f"{kind:12} {sum(rights):4} of {len(rights):4}  {figures[-1].value:7.1%}  {verdict}", flush=True)
    if options.out:
        write_results(
            options.out,
            title="The small model's answers",
            system=system,
            settings={"size": options.size, "side": "transformers" if options.transformers else "server"},
            figures=figures,
            notes=["The pass marks are goals: shares of right chats."],
        )
    return int(not passed(figures))


if __name__ == "__main__":
    sys.exit(main())
