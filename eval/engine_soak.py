"""Many streams of mixed lengths on a server, some cancelled; every answer against that of the request alone.

    python eval/engine_soak.py --base-url http://127.0.0.1:8000 [--minutes 5] [--streams 64] [--max-length 60000]

For any served model. A request is a prompt of token ids, and its answer 16 greedy tokens. Batches round
differently, so where an answer differs, the two tokens must have been nearly tied when the request was alone. At
the end the server must hold no request and no page but those of the prefix cache, and answer as at first.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from dataclasses import dataclass
from typing import Any

import httpx

_NUM_TOKENS = 16
_NUM_REQUESTS = 96
_TIE = 0.15
"""Between log-probabilities, in nats."""
_STALL_SECONDS = 120.0
_LENGTHS = (1, 2, 63, 64, 65, 500, 2047, 2048, 2049, 4000, 8000, 16000, 30000, 60000)


@dataclass(frozen=True)
class Answer:
    """Tokens, each with the log-probabilities of the likeliest."""

    tokens: list[str]
    top: list[dict[str, float]]


async def ask(client: httpx.AsyncClient, model: str, prompt: list[int], stop_after: int | None = None) -> Answer:
    """Stream an answer; close the connection after so many tokens, if given."""
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
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            logprobs = json.loads(line.removeprefix("data: "))["choices"][0]["logprobs"]
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
    """The server's running and waiting requests and the share of pages in use."""
    wanted = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    found = {}
    for line in (await client.get("/metrics")).text.splitlines():
        name = line.partition("{")[0]
        if name in wanted and not line.startswith("#"):
            found[name] = found.get(name, 0.0) + float(line.rsplit(" ", 1)[1])
    return found


async def soak(arguments: argparse.Namespace) -> int:
    source = random.Random(0)
    timeout = httpx.Timeout(_STALL_SECONDS)
    limits = httpx.Limits(max_connections=arguments.streams + 8)
    async with httpx.AsyncClient(base_url=arguments.base_url, timeout=timeout, limits=limits) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        lengths = [n for n in _LENGTHS if n <= arguments.max_length]
        prompts = []
        for index in range(_NUM_REQUESTS):
            length = lengths[index] if index < len(lengths) else int(arguments.max_length ** source.random())
            prompts.append([source.randrange(2, arguments.vocabulary) for _ in range(length)])
        alone = [await ask(client, model, prompt) for prompt in prompts]
        print(f"{len(alone)} requests alone, up to {max(map(len, prompts))} tokens", flush=True)
        counts = {"answered": 0, "cancelled": 0, "wrong": 0, "wrong after": 0}
        end = time.monotonic() + 60 * arguments.minutes

        async def stream(number: int) -> None:
            choice = random.Random(number)
            while time.monotonic() < end:
                index = choice.randrange(len(prompts))
                if choice.random() < 0.25:
                    await ask(client, model, prompts[index], stop_after=choice.randrange(1, _NUM_TOKENS))
                    counts["cancelled"] += 1
                    continue
                reason = disagreement(alone[index], await ask(client, model, prompts[index]))
                counts["answered"] += 1
                if reason:
                    counts["wrong"] += 1
                    print(f"prompt of {len(prompts[index])} tokens: {reason}", flush=True)

        await asyncio.gather(*(stream(number) for number in range(arguments.streams)))
        for _ in range(30):  # what was cancelled last is let go within a few steps
            left: dict[str, Any] = await gauges(client)
            if not left["vllm:num_requests_running"] + left["vllm:num_requests_waiting"]:
                break
            await asyncio.sleep(1)
        after = [
            disagreement(a, await ask(client, model, p)) for a, p in zip(alone[:20], prompts[:20], strict=True)
        ]
        counts["wrong after"] = sum(map(bool, after))
        print(counts, left)
        hanging = left["vllm:num_requests_running"] + left["vllm:num_requests_waiting"]
        return int(bool(counts["wrong"] or counts["wrong after"] or hanging or not counts["answered"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", required=True)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=60_000, help="of a prompt, in tokens")
    parser.add_argument("--vocabulary", type=int, default=1000, help="prompts are made of the ids below")
    sys.exit(asyncio.run(soak(parser.parse_args())))


if __name__ == "__main__":
    main()
