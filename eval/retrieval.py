"""Whether a served model finds codes in long texts: per length, with eight streams at once.

    python eval/retrieval.py --base-url http://127.0.0.1:8000/v1 --out retrieval.json    (and retrieval.md)
    python eval/retrieval.py --base-url URL --lengths 1K 3K --text records               (eval/'s small model)

A text asks for one to three codes that stand anywhere in it, among codes whose names are the same by half. It
counts as right if the numbers of the answer are those codes, in order, and nothing else. A length is that of the
prompt and the answer, in the server's own tokens; 128K needs --max-model-len 131072 or more.
Results are written after each length. Exits with 1 if the share of a length is below the pass mark.
"""

import argparse
import math
import random
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from results_file import Figure, System, add_server_options, json_path, passed, served_system, write_results
from serving_runs.chat import Chat
from serving_runs.haystacks import DEPTH_BANDS, TEXTS, Haystack, codes_in
from tqdm import tqdm

__all__ = [
    "Ask",
    "Attempt",
    "Scale",
    "ask_server",
    "attempts",
    "check_lengths",
    "measure_scale",
    "num_tokens_of",
    "room_in",
    "summary",
]

LENGTHS = ("3K", "8K", "32K", "128K")
PASS_MARK = 0.95
"""Of the texts of each length. V3.2 attends to 2,048 tokens at a time, so its indexer has to find the codes."""

_SEED = 20_251_201
_LEAST_ROOM = 400
"""Tokens of the longest question with all codes."""
_SLACK = 0.98
"""Of the length is aimed at: texts of the same size differ a little in tokens."""

Ask = Callable[[str, int], tuple[str, int]]
"""From a prompt and how many tokens to answer with at most, to the answer and the tokens of the prompt."""


@dataclass(frozen=True)
class Scale:
    """How the tokens of a prompt grow with the size that its text was asked for."""

    tokens_per_unit: float
    fixed_tokens: float

    def size_for(self, num_tokens: int) -> int:
        return int((num_tokens * _SLACK - self.fixed_tokens) / self.tokens_per_unit)


@dataclass(frozen=True)
class Attempt:
    """One text and what was answered."""

    haystack: Haystack
    answer: str
    num_prompt_tokens: int

    @property
    def is_right(self) -> bool:
        return codes_in(self.answer) == self.haystack.codes


def num_tokens_of(length: str) -> int:
    """``"8K"`` is 8,192 tokens, ``"8000"`` is 8,000.

    Raises:
        ValueError: neither form.
    """
    digits = length.removesuffix("K")
    if not digits.isdecimal() or not int(digits):
        raise ValueError(f"{length!r} is not a length: give tokens, such as 8192, or 8K")
    return int(digits) * (1024 if length.endswith("K") else 1)


def room_in(length: str, max_tokens: int) -> int:
    """Tokens of a length that are left for the prompt.

    Raises:
        ValueError: they do not hold the codes and the question.
    """
    room = num_tokens_of(length) - max_tokens
    if room < _LEAST_ROOM:
        raise ValueError(
            f"{length} tokens do not hold a text and an answer of {max_tokens}: a text takes up to {_LEAST_ROOM}"
        )
    return room


def check_lengths(lengths: Sequence[str], max_model_len: int | None) -> None:
    """Compare them with the longest context of the server, where that is known.

    Raises:
        SystemExit: the server would refuse some of the texts.
    """
    too_long = [length for length in lengths if max_model_len is not None and num_tokens_of(length) > max_model_len]
    if too_long:
        raise SystemExit(
            f"The server's --max-model-len is {max_model_len}: it would refuse texts of {', '.join(too_long)}. "
            "Start it with more, or give shorter --lengths."
        )


def measure_scale(ask: Ask, text: str, longest: int) -> Scale:
    """Have the server count the tokens of two texts.

    Args:
        ask: the model.
        text: a key of :data:`TEXTS`.
        longest: tokens of a text to come.
    """
    sizes = 256, min(max(512, longest // 16), 8192)
    prompts = [TEXTS[text](random.Random(_SEED), size, 0).prompt for size in sizes]
    counts = [ask(prompt, 1)[1] for prompt in prompts]
    slope = (counts[1] - counts[0]) / (sizes[1] - sizes[0])
    return Scale(slope, counts[0] - slope * sizes[0])


def attempts(
    ask: Ask, text: str, scale: Scale, length: str, num: int, *, streams: int, max_tokens: int
) -> list[Attempt]:
    """Ask for the codes of so many texts of a length.

    Args:
        ask: the model.
        text: a key of :data:`TEXTS`.
        scale: of this text on this server.
        length: as :func:`num_tokens_of` reads it.
        num: texts; the first ones are the same whatever it is.
        streams: requests at once.
        max_tokens: of an answer.

    Raises:
        ValueError: see :func:`room_in`.
    """
    room = room_in(length, max_tokens)
    source = random.Random(f"{_SEED} {text} {length}")
    haystacks = [TEXTS[text](source, scale.size_for(room), index) for index in range(num)]
    with ThreadPoolExecutor(streams) as pool:
        answers = pool.map(lambda made: ask(made.prompt, max_tokens), haystacks)
        shown = tqdm(zip(haystacks, answers, strict=True), desc=f"{length} tokens", total=num, unit="text")
        return [Attempt(haystack, *answer) for haystack, answer in shown]


def ask_server(chat: Chat, prompt: str, max_tokens: int, *, thinking: bool) -> tuple[str, int]:
    """An :data:`Ask` of a server, once its first and last arguments are given.

    Raises:
        RuntimeError: it does not count a prompt's tokens.
    """
    reply = chat.reply([{"role": "user", "content": prompt}], max_tokens=max_tokens, thinking=thinking)
    if reply.num_prompt_tokens is None:
        raise RuntimeError(f"{chat.base_url} does not say how many tokens a prompt has (usage.prompt_tokens)")
    return reply.content, reply.num_prompt_tokens


def summary(length: str, made: Sequence[Attempt]) -> dict[str, Any]:
    """What the attempts at one length come to; ``found by depth`` counts codes, from the text's beginning on."""
    found: list[list[bool]] = [[] for _ in range(DEPTH_BANDS)]
    for attempt in made:
        answered = codes_in(attempt.answer)
        for needle in attempt.haystack.needles:
            found[needle.band].append(needle.code in answered)
    counts = [attempt.num_prompt_tokens for attempt in made]
    return {
        "length": length,
        "right": sum(attempt.is_right for attempt in made),
        "texts": len(made),
        "prompt tokens": f"{min(counts)} to {max(counts)}",
        "found by depth": ", ".join(f"{sum(band)}/{len(band)}" for band in found),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_server_options(parser)
    parser.add_argument(
        "--lengths", nargs="+", default=LENGTHS, metavar="TOKENS", help=f"(default: {' '.join(LENGTHS)})"
    )
    parser.add_argument("--text", choices=TEXTS, default="prose", help="records: what the small model can read")
    parser.add_argument("--texts", type=int, default=40, help="of each length (default: 40)")
    parser.add_argument("--streams", type=int, default=8, help="requests at once (default: 8)")
    parser.add_argument("--thinking", action="store_true", help="have the model think; give it more --max-tokens")
    parser.add_argument("--max-tokens", type=int, default=128, help="of an answer (default: 128)")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one answer (default: 3600)")
    parser.add_argument("--pass-mark", type=float, default=PASS_MARK, help=f"of each length (default: {PASS_MARK})")
    parser.add_argument("--out", type=json_path, metavar="FILE.json", help="write the results here, and to FILE.md")
    options = parser.parse_args(arguments)
    try:
        longest = max(room_in(length, options.max_tokens) for length in options.lengths)
    except ValueError as error:
        parser.error(str(error))
    system = served_system(options)
    check_lengths(options.lengths, system.max_model_len)
    chat = Chat(options.base_url, system.model, timeout=options.timeout)
    ask = partial(ask_server, chat, thinking=options.thinking)
    scale = measure_scale(ask, options.text, longest)
    rows: list[dict[str, Any]] = []
    wrong: list[dict[str, Any]] = []
    # No length has been measured yet: not a number, which does not pass.
    figures = {name: Figure(f"right at {name}", math.nan, pass_mark=options.pass_mark) for name in options.lengths}
    for length in options.lengths:
        made = attempts(
            *(ask, options.text, scale, length, options.texts),
            streams=options.streams,
            max_tokens=options.max_tokens,
        )
        rows.append(summary(length, made))
        share = rows[-1]["right"] / len(made)
        figures[length] = replace(figures[length], value=share, samples=len(made))
        wrong += [{"codes": one.haystack.codes, "answer": one.answer} for one in made if not one.is_right]
        print(f"{', '.join(f'{name} {value}' for name, value in rows[-1].items())}: {share:.1%}", flush=True)
        # After each length: if the next one fails, this one is kept.
        write(options, system, rows, list(figures.values()), wrong)
    return int(not passed(list(figures.values())))


def write(
    options: argparse.Namespace,
    system: System,
    rows: Sequence[dict[str, Any]],
    figures: Sequence[Figure],
    wrong: Sequence[dict[str, Any]],
) -> None:
    """The files, if they are wanted."""
    if options.out is None:
        return
    notes = [f"The pass mark is a goal for each length, {options.pass_mark:.0%} of its texts."]
    if len(rows) < len(figures):
        notes.append("The run did not end: lengths without a number were not measured.")
    write_results(
        options.out,
        title="Retrieval from long contexts",
        system=system,
        settings={name: getattr(options, name) for name in ("text", "streams", "thinking", "max_tokens")},
        figures=figures,
        notes=notes,
        tables={"By length": rows},
        details={"wrong": wrong},
    )


if __name__ == "__main__":
    sys.exit(main())
