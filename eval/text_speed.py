"""How fast the text side is: this plugin against vLLM's own, on the same inputs, in one process.

    python eval/text_speed.py                    prints tables; a few minutes on one core
    python eval/text_speed.py --json speed.json  writes the numbers too
    python eval/text_speed.py --tiny             small inputs, in seconds: to see that it runs

Measured is what vLLM's API server does for every chat request: rendering the history, and parsing each delta
of a streamed reply. Both sides are warmed up and the best of several repetitions counts. The two sides' results
are compared first, and a difference that matters stops the run.

Left out, as equal on both sides: reading the HTTP request and tokenizing the prompt.

vLLM's tool parser sends an argument's text only as far as its last ">". Where its largest piece is the whole
argument, it did not stream, and it is spared the work of one message a token.
"""

import argparse
import gc
import json
import math
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from text_cases.histories import assistant, block, call, invoke, parameter, result, system, user
from text_cases.replies import TOOLS
from text_sides import Answer, Delta, Side, chat_request, cut, environment, open_sides

PROSE = ("the", "value", "of", "each", "item", "is", "read", "once", "and", "kept", "until", "then", "next.\n")
CODE = (
    "def",
    "f(x):",
    "return",
    "self.items[i]",
    "==",
    '"x"',
    "'\\n'",
    "->",
    ">",
    "<b>",
    "</b>",
    "#",
    "你好",
    "{}\n",
)
NUM_MESSAGES = (3, 6, 12, 25, 50, 100)
SIDES = ("plugin", "in-tree")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--tiny", action="store_true", help="small inputs, one repetition")
    parser.add_argument("--repeat", type=int, default=5, help="repetitions; the best counts (default: 5)")
    options = parser.parse_args()
    scale, repeat = (50, 1) if options.tiny else (1, options.repeat)
    with open_sides() as sides:
        report = {
            **environment(),
            "repeat": repeat,
            "encoding": measure_encoding(sides, 10_000 // scale, repeat),
            "tool_streaming": measure_streaming(sides, tool_replies(scale), repeat),
            "reasoning_streaming": measure_streaming(sides, thoughtful_replies(scale), repeat),
        }
    print_report(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# Rendering a history.


def measure_encoding(sides: tuple[Side, Side], num_bytes: int, repeat: int) -> dict[str, Any]:
    """Seconds to render histories of growing numbers of messages, of so many bytes each on average.

    The exponent is fitted to the four longest ones; in the shorter ones the fixed costs show.
    """
    rows = []
    for num_messages in NUM_MESSAGES:
        history = tool_loop(num_messages, num_bytes)
        # The two prompts hold the same text, but vLLM's has the tools elsewhere, with other blank lines.
        characters = [Counter("".join(render(side, history)[1].split())) for side in sides]
        check(characters[0] == characters[1], f"the prompts for {num_messages} messages hold different text")
        row: dict[str, Any] = {
            "messages": num_messages,
            "bytes": len(json.dumps(history, ensure_ascii=False).encode()),
        }
        for side in sides:
            row[side.name] = min(render(side, history)[0] for _ in range(10 * repeat))
        rows.append({**row, "ratio": row["in-tree"] / row["plugin"]})
    return {"sizes": rows, "exponent": {name: fit_exponent(rows[-4:], name) for name in SIDES}}


def render(side: Side, history: list[Any]) -> tuple[float, str]:
    """The seconds that one rendering takes, and the prompt."""
    # A new request each time, as vLLM's renderer writes into the messages that it is given.
    messages = chat_request(TOOLS, messages=json.loads(json.dumps(history))).messages
    start = time.perf_counter()
    prompt = side.render(messages, {"tools": TOOLS, "thinking": True})
    return time.perf_counter() - start, prompt


def tool_loop(num_messages: int, num_bytes: int) -> list[Any]:
    """An agent's history: a system prompt and a task, then thoughts with a call, and results, by turns."""
    source = random.Random(0)
    messages = [system(text(source, PROSE, num_bytes)), user(text(source, PROSE, num_bytes))]
    while len(messages) < num_messages:
        call_id = str(len(messages))
        command = json.dumps({"command": text(source, CODE, num_bytes // 2)}, ensure_ascii=False)
        thoughts = text(source, PROSE, num_bytes // 2)
        messages.append(assistant("Next.", reasoning=thoughts, tool_calls=[call(call_id, "run", command)]))
        messages.append(result(call_id, text(source, CODE, num_bytes)))
    # An odd number ends with a call that has no result yet.
    return messages[:num_messages]


def fit_exponent(rows: Sequence[dict[str, Any]], name: str) -> float:
    """The slope of log seconds over log bytes, by least squares: 1 is linear."""
    x = [math.log(row["bytes"]) for row in rows]
    y = [math.log(row[name]) for row in rows]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


# Parsing a streamed reply.


@dataclass
class Streamed:
    """A reply, what the client must get, and the long part of it whose four quarters are timed."""

    name: str
    reply: str
    long_part: str
    answer: Answer
    with_reasoning: bool = True


def tool_replies(scale: int) -> list[Streamed]:
    """Replies of 32,000 tokens: with a string argument of 20,000, and without a call. One token is one byte."""
    content = text(random.Random(0), CODE, 32_000 // scale)
    replies = [Streamed("no call", content, content, Answer(content=content))]
    for kind, words in (("code", CODE), ("prose", PROSE)):
        source = random.Random(0)
        argument = text(source, words, 20_000 // scale)
        before, after = (text(source, PROSE, 5_700 // scale) for _ in range(2))
        reply = before + block(*(invoke("run", parameter("command", value)) for value in (argument, after)))
        calls = [("run", json.dumps({"command": value}, ensure_ascii=False)) for value in (argument, after)]
        for with_reasoning in (True, False):
            flags = "tool and reasoning parser" if with_reasoning else "tool parser alone"
            answer = Answer(content=before, calls=calls)
            replies.append(Streamed(f"{kind}, {flags}", reply, argument, answer, with_reasoning))
    return replies


def thoughtful_replies(scale: int) -> list[Streamed]:
    """Replies that think for 32,000 tokens."""
    replies = []
    for kind, words in (("code", CODE), ("prose", PROSE)):
        thoughts = text(random.Random(0), words, 32_000 // scale)
        answer = Answer(reasoning=thoughts, content="Done.")
        replies.append(Streamed(f"thoughts of {kind}", f"{thoughts}</think>Done.", thoughts, answer))
    return replies


def measure_streaming(sides: tuple[Side, Side], replies: Sequence[Streamed], repeat: int) -> list[dict[str, Any]]:
    """Tokens per second, microseconds per token over each quarter of the long part, and the largest piece sent."""
    rows = []
    for streamed in replies:
        request = chat_request(TOOLS, thinking=bool(streamed.answer.reasoning))
        for tokens_per_delta in (1, 4):
            row: dict[str, Any] = {"reply": streamed.name, "tokens_per_delta": tokens_per_delta}
            for side in sides:
                deltas = cut(side.tokenizer, streamed.reply, tokens_per_delta)
                answer = side.stream(request, deltas, with_reasoning=streamed.with_reasoning)
                check(_trimmed(answer) == _trimmed(streamed.answer), f"{side.name}: not the reply: {streamed.name}")
                row["tokens"] = sum(len(ids) for _, ids in deltas)
                times = _measure(side, request, streamed, deltas, repeat)
                row[side.name] = {**times, "largest_piece": answer.largest_piece}
            ratio = row["plugin"]["tokens_per_second"] / row["in-tree"]["tokens_per_second"]
            rows.append({**row, "ratio": ratio})
    return rows


def _measure(side: Side, request: Any, streamed: Streamed, deltas: list[Delta], repeat: int) -> dict[str, Any]:
    first, last = _token_range(side, streamed)
    marks = [0, *(first + (last - first) * quarter // 4 for quarter in range(5))]
    tokens_per_delta = len(deltas[0][1])
    bounds = [mark // tokens_per_delta for mark in marks] + [len(deltas)]
    parts = [deltas[start:end] for start, end in pairwise(bounds)]
    runs = [_stream_seconds(side, request, streamed, parts) for _ in range(repeat)]
    quarters = [min(run[part] for run in runs) for part in range(1, 5)]
    num_tokens = [sum(len(ids) for _, ids in part) for part in parts[1:5]]
    total = sum(len(ids) for _, ids in deltas)
    return {
        "tokens_per_second": total / min(sum(run) for run in runs),
        "us_per_token_by_quarter": [
            1e6 * seconds / number for seconds, number in zip(quarters, num_tokens, strict=True)
        ],
    }


def _token_range(side: Side, streamed: Streamed) -> tuple[int, int]:
    """Where the long part starts and ends in the tokens of the reply."""
    head = streamed.reply.partition(streamed.long_part)[0]
    first, length = (
        len(side.tokenizer.encode(part, add_special_tokens=False)) for part in (head, streamed.long_part)
    )
    return first, first + length


def _stream_seconds(side: Side, request: Any, streamed: Streamed, parts: list[list[Delta]]) -> list[float]:
    """The seconds that each part of the deltas takes in vLLM's own call for one delta."""
    parser = side.parser(request, with_reasoning=streamed.with_reasoning)
    prompt = side.prompt_ids(request)
    gc.collect()
    seconds = []
    for number, part in enumerate(parts, 1):
        is_last_part, num_deltas = number == len(parts), len(part)
        start = time.perf_counter()
        for position, (delta_text, ids) in enumerate(part, 1):
            parser.parse_delta(delta_text, ids, request, prompt, finished=is_last_part and position == num_deltas)
        seconds.append(time.perf_counter() - start)
    return seconds


def _trimmed(answer: Answer) -> tuple[str, str, list[tuple[str, Any]]]:
    """An answer for comparison: vLLM leaves the blank line before calls in the content."""
    return answer.reasoning, answer.content.strip(), [(name, json.loads(value)) for name, value in answer.calls]


# Both.


def text(source: random.Random, words: Sequence[str], num_bytes: int) -> str:
    """Random words, of so many bytes in UTF-8 or just above."""
    chosen: list[str] = []
    while num_bytes > 0:
        chosen.append(source.choice(words))
        num_bytes -= len(chosen[-1].encode()) + 1
    return " ".join(chosen)


def check(is_right: bool, complaint: str) -> None:
    """Stop the run if what is to be measured does not do its work."""
    if not is_right:
        raise SystemExit(f"text_speed: {complaint}")


def print_report(report: dict[str, Any]) -> None:
    """The tables."""
    print(
        f"{report['host']['cpu']}; " + ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    )
    print(f"Best of {report['repeat']}. Ratio: how many times faster the plugin is than vLLM's own.")
    print("\nRendering a history: milliseconds")
    print(f"{'messages':>10}{'kB':>8}{'plugin':>10}{'in-tree':>10}{'ratio':>8}")
    for row in report["encoding"]["sizes"]:
        print(
            f"{row['messages']:>10}{row['bytes'] / 1000:>8.0f}{1000 * row['plugin']:>10.2f}"
            f"{1000 * row['in-tree']:>10.2f}{row['ratio']:>8.1f}"
        )
    exponent = report["encoding"]["exponent"]
    print(f"grows as bytes to the power of{exponent['plugin']:>8.2f}{exponent['in-tree']:>10.2f}")
    for key, title in (
        ("tool_streaming", "Streaming tool calls"),
        ("reasoning_streaming", "Streaming thoughts"),
    ):
        print(f"\n{title}: thousand tokens per second (kt/s), microseconds per token in the first and in the last")
        print("quarter of the long part, and the characters of the largest piece that the client got at once")
        print(f"{'':33}{'tokens/':>8}  {'plugin':30}  in-tree")
        columns = "".join(f"{name:>8}" for name in ("kt/s", "first", "last", "piece"))
        print(f"{'reply':33}{'delta':>8}{columns}{columns}{'ratio':>7}")
        for row in report[key]:
            line = f"{row['reply']:33}{row['tokens_per_delta']:>8}"
            for name in SIDES:
                quarters = row[name]["us_per_token_by_quarter"]
                line += f"{row[name]['tokens_per_second'] / 1000:>8.1f}{quarters[0]:>8.1f}{quarters[-1]:>8.1f}"
                line += f"{row[name]['largest_piece']:>8}"
            print(line + f"{row['ratio']:>7.1f}")


if __name__ == "__main__":
    main()
