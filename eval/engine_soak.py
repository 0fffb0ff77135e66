"""Many streams of mixed lengths on a server, some cancelled; every answer against that of the request alone.

    python eval/engine_soak.py --base-url http://127.0.0.1:8000/v1 [--minutes 5] [--streams 64] [--max-length 60000]
    (--out FILE.json writes the results there, and to FILE.md)

For any served model. A request is a prompt of token ids, and its answer 16 greedy tokens. Batches round
differently, so where an answer differs, the two tokens must have been nearly tied when the request was alone. At
the end the server must hold no request and no page but those of the prefix cache, and answer as at first. A request
that fails, or gets no token for --stall-seconds, is counted.
Exits with 1 if anything of this is not so; the pass marks are goals.
"""

import argparse
import asyncio
import json
import math
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx
from results_file import Figure, add_server_options, json_path, passed, served_system, write_results

__all__ = ["Answer", "Found", "disagreement", "figures_of"]

_NUM_TOKENS = 16
_NUM_REQUESTS = 96
_MAX_LENGTH = 60_000
_SHARE_CANCELLED = 0.25
_TIE = 0.15
"""Between log-probabilities, in nats."""
_RUNNING, _WAITING, _PAGES = "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"
_SETTINGS = ("minutes", "streams", "max_length", "vocabulary", "stall_seconds")
_LENGTHS = (1, 2, 63, 64, 65, 500, 2047, 2048, 2049, 4000, 8000, 16000, 30000, 60000)


@dataclass(frozen=True)
class Answer:
    """Tokens, each with the log-probabilities of the likeliest."""

    tokens: list[str]
    top: list[dict[str, float]]


async def ask(client: httpx.AsyncClient, model: str, prompt: list[int], stop_after: int | None = None) -> Answer:
    """Stream an answer; close the connection after so many tokens, if given.

    Raises:
        httpx.HTTPError: it is refused, stalls or breaks off.
    """
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": _NUM_TOKENS,
        "temperature": 0,
        "logprobs": 5,
        "stream": True,
        "ignore_eos": True,
        "return_tokens_as_token_ids": True,
    }
    tokens: list[str] = []
    top: list[dict[str, float]] = []
    async with client.stream("POST", "/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise httpx.RemoteProtocolError(f"the stream broke off: {chunk['error']}")
            logprobs = chunk["choices"][0]["logprobs"]
            tokens += logprobs["tokens"]
            top += logprobs["top_logprobs"]
            if stop_after is not None and len(tokens) >= stop_after:
                break
    return Answer(tokens, top)


def disagreement(alone: Answer, loaded: Answer) -> str | None:
    """Why two answers cannot come from the same model, or None."""
    if len(loaded.tokens) != len(alone.tokens):
        return f"{len(loaded.tokens)} tokens, alone {len(alone.tokens)}"
    for place, (a, b) in enumerate(zip(alone.tokens, loaded.tokens, strict=True)):
        if a != b:
            gap = alone.top[place][a] - alone.top[place].get(b, float("-inf"))
            return None if gap < _TIE else f"token {place}: {b} for {a}, which alone was {gap:.2f} nats likelier"
    return None


async def gauges(client: httpx.AsyncClient) -> dict[str, float]:
    """The server's running and waiting requests and the share of pages in use.

    Raises:
        SystemExit: the server does not tell one of them.
        httpx.HTTPError: it does not answer.
    """
    found: dict[str, float] = {}
    url = str(client.base_url).rstrip("/").removesuffix("/v1") + "/metrics"
    for line in (await client.get(url)).raise_for_status().text.splitlines():
        name = line.partition("{")[0]
        if name in (_RUNNING, _WAITING, _PAGES):
            found[name] = found.get(name, 0.0) + float(line.rsplit(" ", 1)[1])
    if missing := {_RUNNING, _WAITING, _PAGES} - found.keys():
        raise SystemExit(f"{url}: expected vLLM's metrics, got none of {', '.join(sorted(missing))}.")
    return found


@dataclass
class Found:
    """What a soak counted."""

    answered: int = 0
    cancelled: int = 0
    failed: list[str] = field(default_factory=list)
    """A line for each request that was refused, stalled or broke off, under load or not."""
    wrong: list[str] = field(default_factory=list)
    """A line for each wrong answer."""
    wrong_after: list[str] = field(default_factory=list)
    """Of requests that were alone again in the end."""
    held: dict[str, float] = field(default_factory=lambda: dict.fromkeys((_RUNNING, _WAITING, _PAGES), math.nan))
    """Gauges in the end; not numbers if the server did not tell."""

    @contextmanager
    def counting(self, when: str) -> Iterator[None]:
        """A request that fails ends what is inside, and is counted."""
        try:
            yield
        except httpx.HTTPError as error:
            self.failed.append(f"{when}: {type(error).__name__}: {error}")
            print(self.failed[-1], flush=True)


async def soak(options: argparse.Namespace, model: str) -> Found:
    source = random.Random(0)
    key = os.environ.get("OPENAI_API_KEY")
    async with httpx.AsyncClient(
        base_url=options.base_url,
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=httpx.Timeout(options.stall_seconds),
        limits=httpx.Limits(max_connections=options.streams + 8),
    ) as client:
        lengths = [n for n in _LENGTHS if n <= options.max_length]
        prompts = []
        for index in range(_NUM_REQUESTS):
            length = lengths[index] if index < len(lengths) else int(options.max_length ** source.random())
            prompts.append([source.randrange(2, options.vocabulary) for _ in range(length)])
        found = Found()
        alone: list[Answer] = []
        with found.counting("alone"):
            for prompt in prompts:
                alone.append(await ask(client, model, prompt))
        print(f"{len(alone)} requests alone, up to {max(map(len, prompts))} tokens", flush=True)
        end = time.monotonic() + 60 * options.minutes

        async def compare(index: int, into: list[str]) -> None:
            reason = disagreement(alone[index], await ask(client, model, prompts[index]))
            if reason:
                into.append(f"prompt of {len(prompts[index])} tokens: {reason}")
                print(into[-1], flush=True)

        async def request(choice: random.Random) -> None:
            index = choice.randrange(len(alone))
            if choice.random() < _SHARE_CANCELLED:
                await ask(client, model, prompts[index], stop_after=choice.randrange(1, _NUM_TOKENS))
                found.cancelled += 1
                return
            await compare(index, found.wrong)
            found.answered += 1

        async def stream(number: int) -> None:
            choice = random.Random(number)
            while alone and time.monotonic() < end:
                num_failed = len(found.failed)
                with found.counting("under load"):
                    await request(choice)
                if len(found.failed) > num_failed:
                    await asyncio.sleep(1)  # a server that is gone refuses at once

        await asyncio.gather(*(stream(number) for number in range(options.streams)))
        with found.counting("afterwards"):
            for index in range(min(20, len(alone))):
                await compare(index, found.wrong_after)
        with found.counting("in the end"):
            for _ in range(30):  # what was cancelled last is let go within a few steps
                found.held = await gauges(client)
                if not any(found.held.values()):
                    break
                await asyncio.sleep(1)
        return found


def max_length_of(options: argparse.Namespace, max_model_len: int | None) -> int:
    """Of a prompt: what was asked for, else as much as the server takes up to a limit.

    Raises:
        SystemExit: the server would refuse prompts of what was asked for.
    """
    room = math.inf if max_model_len is None else max_model_len - _NUM_TOKENS
    if options.max_length is None:
        return int(min(_MAX_LENGTH, room))
    if options.max_length > room:
        raise SystemExit(
            f"A prompt of {options.max_length} tokens and {_NUM_TOKENS} of its answer are more than the server's "
            f"--max-model-len, {max_model_len}. Start it with more, or give a lower --max-length."
        )
    return options.max_length


def figures_of(found: Found) -> list[Figure]:
    """All but the cancelled requests have a mark."""

    def none_of(name: str, value: float, unit: str = "") -> Figure:
        return Figure(name, value, unit=unit, pass_mark=0, higher_is_better=False)

    return [
        Figure("answered under load", found.answered, pass_mark=1),
        Figure("cancelled under load", found.cancelled),
        none_of("stalled or failed", len(found.failed)),
        none_of("wrong under load", len(found.wrong)),
        none_of("wrong afterwards", len(found.wrong_after)),
        none_of("requests held in the end", found.held[_RUNNING] + found.held[_WAITING]),
        none_of("share of pages held in the end", found.held[_PAGES]),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_server_options(parser)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument(
        "--max-length", type=int, help=f"of a prompt, in tokens (default: {_MAX_LENGTH}, or what the server takes)"
    )
    parser.add_argument("--stall-seconds", type=float, default=120, help="without a token (default: 120)")
    parser.add_argument("--vocabulary", type=int, default=1000, help="prompts are made of the ids below")
    parser.add_argument("--out", type=json_path, metavar="FILE.json", help="write the results here, and to FILE.md")
    options = parser.parse_args(arguments)
    system = served_system(options)
    options.max_length = max_length_of(options, system.max_model_len)
    found = asyncio.run(soak(options, system.model))
    figures = figures_of(found)
    for figure in figures:
        print(f"{figure.name}: {figure.value:g}{' misses the mark' if figure.passed is False else ''}")
    if options.out:
        write_results(
            options.out,
            title="Answers under load",
            system=system,
            settings={name: getattr(options, name) for name in _SETTINGS},
            figures=figures,
            notes=[
                "The pass marks are goals: nothing fails, no answer is wrong, and nothing is held.",
                f"An answer may leave that of the request alone where two tokens were less than {_TIE} nats apart.",
            ],
            details={"failed": found.failed, "wrong": found.wrong, "wrong afterwards": found.wrong_after},
        )
    return int(not passed(figures))


if __name__ == "__main__":
    sys.exit(main())
