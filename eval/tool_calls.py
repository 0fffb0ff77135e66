"""Whether a served model makes the tool calls it should, whole and streamed, with and without thinking.

    python eval/tool_calls.py --base-url http://127.0.0.1:8000/v1 --out tool_calls.json    (and tool_calls.md)
    python eval/tool_calls.py --base-url URL --kinds loop                                  (eval/'s small model)

The server needs --enable-auto-tool-choice, --tool-call-parser and --reasoning-parser. A conversation counts as
right if every message makes the calls that it should, with the arguments that were asked for, and if the answers
hold what the tools gave back. The arguments of every call must be valid JSON. A request that fails makes its
conversation wrong. Exits with 1 below a pass mark.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import httpx
import jsonschema
from openai import OpenAIError
from results_file import Figure, add_server_options, json_path, passed, served_system, write_results
from serving_runs.chat import Chat, Reply, StreamError
from serving_runs.tool_cases import KINDS, Case, Round, Turn, Wanted
from tqdm import tqdm

__all__ = ["Mode", "Outcome", "Replier", "is_wanted", "play"]

PASS_MARK = 0.9
"""Of the conversations."""
SCHEMA_PASS_MARK = 0.98
"""Of the calls: the model is not held to the schemas by a grammar."""

Replier = Callable[[list[dict[str, Any]], list[dict[str, Any]]], Reply]
"""From a history and tools to the next message."""


@dataclass(frozen=True)
class Mode:
    """How a conversation is held."""

    stream: bool
    thinking: bool

    def __str__(self) -> str:
        return f"{'streamed' if self.stream else 'whole'}, {'thinking' if self.thinking else 'not thinking'}"


@dataclass
class Outcome:
    """Of one conversation."""

    num_calls: int = 0
    num_valid_json: int = 0
    """Calls whose arguments are a JSON object."""
    num_valid: int = 0
    """Calls of a tool that there is, whose arguments fit its schema."""
    complaint: str = ""
    """What ended it; empty if all was right."""
    said: list[dict[str, Any]] = field(default_factory=list)
    """The model's messages."""


def play(case: Case, reply: Replier) -> Outcome:
    """Hold a conversation, up to the first message that is wrong."""
    outcome = Outcome()
    history: list[dict[str, Any]] = []
    for turn in case.turns:
        history.append({"role": "user", "content": turn.question})
        outcome.complaint = _play_turn(turn, case.tools, history, reply, outcome)
        if outcome.complaint:
            break
    return outcome


def _play_turn(
    turn: Turn, tools: list[dict[str, Any]], history: list[dict[str, Any]], reply: Replier, outcome: Outcome
) -> str:
    for wanted in [*turn.rounds, []]:
        try:
            answer = reply(history, tools)
        except StreamError as error:
            return str(error)
        except (OpenAIError, httpx.HTTPError) as error:
            return f"the request failed: {type(error).__name__}: {error}"
        outcome.said.append(answer.message)
        made = [_checked(call, tools, outcome) for call in answer.calls]
        order = _matched(made, wanted)
        if order is None:
            return f"expected {_text(wanted)}, got {_text(made)}"
        if answer.finish_reason != ("tool_calls" if wanted else "stop"):
            return f"finish_reason is {answer.finish_reason!r} after {_text(made)}"
        history.append(answer.message)
        for call, one in zip(answer.message.get("tool_calls") or [], order, strict=True):
            history.append({"role": "tool", "tool_call_id": call["id"], "content": one.result})
    if not re.search(turn.answer, answer.content, re.IGNORECASE):
        return f"expected {turn.answer!r} in the answer, got {answer.content!r}"
    return ""


def _checked(call: dict[str, str], tools: list[dict[str, Any]], outcome: Outcome) -> Wanted | None:
    """The call, counted; None if it is not one that could be carried out."""
    outcome.num_calls += 1
    try:
        arguments = json.loads(call["arguments"], parse_constant=_refuse_constant)
    except ValueError:
        return None
    if not isinstance(arguments, dict):
        return None
    outcome.num_valid_json += 1
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    if call["name"] not in schemas or not jsonschema.Draft202012Validator(schemas[call["name"]]).is_valid(
        arguments
    ):
        return None
    outcome.num_valid += 1
    return Wanted(call["name"], arguments)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _matched(made: Sequence[Wanted | None], wanted: Round) -> Round | None:
    """Which wanted call each of those made is; None if they are not the same calls."""
    left = list(wanted)
    order = []
    for call in made:
        found = next((one for one in left if call is not None and _is_same(call, one)), None)
        if found is None:
            return None
        left.remove(found)
        order.append(found)
    return None if left else order


def _is_same(call: Wanted, wanted: Wanted) -> bool:
    return call.name == wanted.name and all(
        name in call.arguments and is_wanted(call.arguments[name], value)
        for name, value in wanted.arguments.items()
    )


def is_wanted(value: Any, wanted: Any) -> bool:
    """Whether an argument is what was asked for; blanks around a text do not count, nor does 1 against 1.0."""
    match wanted:
        case re.Pattern():
            return isinstance(value, str) and wanted.fullmatch(value.strip()) is not None
        case str():
            return isinstance(value, str) and value.strip() == wanted.strip()
        case dict():
            return isinstance(value, dict) and all(
                name in value and is_wanted(value[name], inner) for name, inner in wanted.items()
            )
        case list():
            return (
                isinstance(value, list)
                and len(value) == len(wanted)
                and all(is_wanted(one, other) for one, other in zip(value, wanted, strict=True))
            )
        case _:
            return isinstance(value, bool) == isinstance(wanted, bool) and value == wanted


def _text(calls: Sequence[Wanted | None]) -> str:
    names = ["a call that is no JSON or fits no schema" if call is None else _call_text(call) for call in calls]
    return " and ".join(names) or "no call"


def _call_text(call: Wanted) -> str:
    arguments = (
        f"{name}={value.pattern if isinstance(value, re.Pattern) else value!r}"
        for name, value in call.arguments.items()
    )
    return f"{call.name}({', '.join(arguments)})"


def figures_of(outcomes: Sequence[Outcome], pass_mark: float) -> list[Figure]:
    """Shares of conversations and of calls; without a call there is no share, and no pass."""
    num_calls = sum(outcome.num_calls for outcome in outcomes)
    num_right = sum(not outcome.complaint for outcome in outcomes)

    def share(name: str, num: int, mark: float) -> Figure:
        return Figure(name, num / num_calls if num_calls else math.nan, samples=num_calls, pass_mark=mark)

    return [
        Figure("conversations right", num_right / len(outcomes), samples=len(outcomes), pass_mark=pass_mark),
        share("calls with valid JSON", sum(outcome.num_valid_json for outcome in outcomes), 1.0),
        share("calls that fit their schema", sum(outcome.num_valid for outcome in outcomes), SCHEMA_PASS_MARK),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_server_options(parser)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="(default: all)")
    parser.add_argument("--cases", type=int, help="of each kind, at most (default: all)")
    parser.add_argument("--streams", type=int, default=8, help="conversations at once (default: 8)")
    parser.add_argument("--max-tokens", type=int, default=4096, help="of a message (default: 4096)")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one message (default: 3600)")
    parser.add_argument("--pass-mark", type=float, default=PASS_MARK, help=f"default: {PASS_MARK}")
    parser.add_argument("--out", type=json_path, metavar="FILE.json", help="write the results here, and to FILE.md")
    options = parser.parse_args(arguments)
    system = served_system(options)
    chat = Chat(options.base_url, system.model, timeout=options.timeout)

    def hold(case: Case, mode: Mode) -> Outcome:
        return play(
            case,
            partial(chat.reply, max_tokens=options.max_tokens, stream=mode.stream, thinking=mode.thinking),
        )

    modes = [Mode(stream, thinking) for stream, thinking in product((False, True), repeat=2)]
    runs = [
        (kind, case, mode) for kind in options.kinds for case in KINDS[kind]()[: options.cases] for mode in modes
    ]
    with ThreadPoolExecutor(options.streams) as pool:
        held = pool.map(lambda run: hold(run[1], run[2]), runs)
        outcomes = list(tqdm(held, desc="tool calls", total=len(runs), unit="conversation"))
    figures = figures_of(outcomes, options.pass_mark)
    rows = []
    for kind, mode in product(options.kinds, modes):
        rights = [not o.complaint for run, o in zip(runs, outcomes, strict=True) if run[::2] == (kind, mode)]
        rows.append({"kind": kind, "mode": str(mode), "right": sum(rights), "conversations": len(rights)})
        print(f"{kind:12} {mode!s:24} {sum(rights):3} of {len(rights):3}")
    wrong = [
        {"kind": kind, "case": case.name, "mode": str(mode), "complaint": o.complaint, "said": o.said}
        for (kind, case, mode), o in zip(runs, outcomes, strict=True)
        if o.complaint
    ]
    for one in wrong:
        print(f"{one['kind']}, {one['case']} ({one['mode']}): {one['complaint']}")
    for figure in figures:
        print(f"{figure.name}: {figure.value:.1%} of {figure.samples}, pass mark {figure.pass_mark:.0%}")
    if options.out:
        write_results(
            options.out,
            title="Tool calls",
            system=system,
            settings={"kinds": options.kinds, "temperature": 0, "max_tokens": options.max_tokens},
            figures=figures,
            notes=["The pass marks are goals: all calls are JSON, nearly all fit, most conversations are right."],
            tables={"By kind": rows},
            details={"wrong": wrong},
        )
    return int(not passed(figures))


if __name__ == "__main__":
    sys.exit(main())
