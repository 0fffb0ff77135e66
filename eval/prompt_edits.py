"""What turns the right prompt into the one that vLLM's encoder makes: edits, each with the reason it stands for.

An explanation is a smallest set of edits that, made to the right prompt, gives vLLM's exactly.
"""

import json
import re
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

from text_cases.histories import ASSISTANT, BOS, EOS, History

Edit = Callable[[str], str]

_TOOLS = re.compile(r"\n\n## Tools\n.*?</functions>\n", re.DOTALL)
_FORMAT = re.compile(r"\n\n## Response Format:\n\n[^\n]*\n\{[^\n<]*\}")
_OPENERS = [f"{ASSISTANT}<think>", f"{ASSISTANT}</think>", "\n\n<think>", "\n\n</think>"]
_MAX_EDITS = 4


def explain(history: History, theirs: str) -> list[str] | None:
    """The reasons why `theirs` is not `history.prompt`; None if the known ones do not account for it."""
    edits = [(reason, edit) for reason, edit in _edits(history) if edit(history.prompt) != history.prompt]
    for number in range(_MAX_EDITS + 1):
        for chosen in combinations(edits, number):
            prompt = history.prompt
            for _, edit in chosen:
                prompt = edit(prompt)
            if prompt == theirs:
                return [reason for reason, _ in chosen]
    return None


def with_vllm_key(messages: Sequence[Any]) -> list[Any]:
    """The messages with vLLM's key for reasoning in place of DeepSeek's."""
    renamed = []
    for message in messages:
        copy = dict(message)
        if (reasoning := copy.pop("reasoning_content", None)) is not None:
            copy.setdefault("reasoning", reasoning)
        renamed.append(copy)
    return renamed


def _edits(history: History) -> list[tuple[str, Edit]]:
    opened = "the assistant's turn is opened although add_generation_prompt is off"
    closed = "a message to be continued is closed"
    return [
        ("seven blank lines of the tools text are missing", _drop_blank_lines),
        ("the tools stand before the system prompt or the developer's turn", _move_tools),
        ("a message's own tools are left out", lambda prompt: _TOOLS.sub("", prompt)),
        ("a tool's unset keys are written as null", lambda prompt: _write_unset_keys(history, prompt)),
        ("response_format is left out", lambda prompt: _FORMAT.sub("", prompt)),
        ("a later system message lands inside the assistant's turn", lambda prompt: _move_systems(history, prompt)),
        ("results stand in the client's order, not the calls'", lambda prompt: _reorder_results(history, prompt)),
        *((opened, lambda prompt, opener=opener: prompt + opener) for opener in _OPENERS),
        ("the assistant's turn is not opened although add_generation_prompt is on", _drop_opener),
        (closed, lambda prompt: prompt + EOS),
        (closed, lambda prompt: f"{prompt}</think>{EOS}"),
    ]


def _drop_blank_lines(prompt: str) -> str:
    return _TOOLS.sub(lambda found: "\n\n" + found[0][2:].replace("\n\n", "\n"), prompt)


def _move_tools(prompt: str) -> str:
    found = _TOOLS.search(prompt)
    return prompt if found is None else BOS + found[0] + _TOOLS.sub("", prompt.removeprefix(BOS))


def _write_unset_keys(history: History, prompt: str) -> str:
    for tool in history.options.get("tools", ()):
        function = tool["function"]
        set_keys = {key: value for key, value in function.items() if value is not None}
        prompt = prompt.replace(json.dumps(set_keys, ensure_ascii=False), json.dumps(function, ensure_ascii=False))
    return prompt


def _move_systems(history: History, prompt: str) -> str:
    openers = "|".join(map(re.escape, _OPENERS))
    for message in history.messages[1:]:
        if message["role"] == "system":
            prompt = re.sub(f"({re.escape(message['content'])})({openers})", r"\2\1", prompt)
    return prompt


def _reorder_results(history: History, prompt: str) -> str:
    results = iter([message["content"] for message in history.messages if message["role"] == "tool"])
    if not all(isinstance(message["content"], str) for message in history.messages if message["role"] == "tool"):
        return prompt
    return re.sub(r"<result>.*?</result>", lambda found: f"<result>{next(results, '')}</result>", prompt)


def _drop_opener(prompt: str) -> str:
    for opener in _OPENERS:
        prompt = prompt.removesuffix(opener)
    return prompt
