"""From chats to batches of token ids, made by worker processes while the model trains."""

import itertools
import multiprocessing
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from small_model.tasks import Chat, arithmetic, needle, repeat, tool_loop
from vllm_dsv32.serving.encoding import encode_messages
from vllm_dsv32.tools.tiny_tokenizer import EOS_TOKEN

__all__ = ["Batch", "batches", "make_batch", "tokenise"]

TOKENS_PER_BATCH = 16_384
FURTHEST_POSITION = 18_000


@dataclass
class Batch:
    """Rows of one task and length."""

    task: str
    ids: np.ndarray
    """int64 ``[B, T]``, padded behind."""
    positions: np.ndarray
    """int64 ``[B, T]``."""
    spoken: np.ndarray
    """bool ``[B, T]``: what the assistant says, which is what is learned."""


def tokenise(tokenizer: Tokenizer, chat: Chat) -> tuple[list[int], list[bool]]:
    """Token ids of a chat in the prompt format, and which of them the assistant says."""

    def render(messages: list, **options: bool) -> str:
        return encode_messages(messages, tools=chat.tools or None, thinking=chat.thinking, **options)

    text = render(chat.messages)
    spans, end = [], 0
    for index, message in enumerate(chat.messages):
        if message["role"] == "assistant":
            begin = len(render(chat.messages[:index], add_generation_prompt=True))
            end = text.index(EOS_TOKEN, begin) + len(EOS_TOKEN)
            spans.append((begin, end))
    encoding = tokenizer.encode(text, add_special_tokens=False)
    spoken = [any(begin <= start and stop <= end for begin, end in spans) for start, stop in encoding.offsets]
    return encoding.ids, spoken


def make_batch(
    tokenizer: Tokenizer,
    source: random.Random,
    task: str,
    length: int,
    split: str = "train",
    rows: int | None = None,
) -> Batch:
    """A batch of ``rows`` chats of one task, at most ``length`` tokens each."""
    rows = rows or max(1, TOKENS_PER_BATCH // length)
    make = _maker(tokenizer, source, task, length, split)
    ids, spoken = np.full((rows, length), 2, dtype=np.int64), np.zeros((rows, length), dtype=bool)
    positions = np.tile(np.arange(length, dtype=np.int64), (rows, 1))
    for row in range(rows):
        while True:
            row_ids, row_spoken = tokenise(tokenizer, make())
            if len(row_ids) <= length:
                break
        ids[row, : len(row_ids)], spoken[row, : len(row_ids)] = row_ids, row_spoken
        if split == "train" and source.random() < _SHARE_WITH_GAPS.get(task, 0.0):
            positions[row] += _gaps(source, length)
    return Batch(task, ids, positions, spoken)


def _maker(tokenizer: Tokenizer, source: random.Random, task: str, length: int, split: str) -> Callable[[], Chat]:
    if task == "tools":
        return lambda: tool_loop(source, split)
    if task == "arithmetic":
        return lambda: arithmetic(source, split)
    if task == "repeat":
        return lambda: repeat(source, source.randrange(4, length // 6))

    def count(line: str) -> int:
        # A word is a token here, nearly; exact counts are not needed.
        return line.count(" ") + 3 + 6 * line.startswith("The code")

    num_questions = max(1, min(12, length // 220)) if split == "train" else 1
    room = length - 60 - 75 * num_questions
    return lambda: needle(
        source, split, room if split == "test" else int(room * source.uniform(0.5, 1)), count, num_questions
    )


def _gaps(source: random.Random, length: int) -> np.ndarray:
    """Non-decreasing shifts: the text stands in pieces, far apart, in a longer one that is not there."""
    shifts = np.zeros(length, dtype=np.int64)
    room = FURTHEST_POSITION - length
    cuts = sorted(source.randrange(1, length) for _ in range(source.randrange(1, 6)))
    for cut in cuts:
        shift = source.randrange(0, max(1, room // len(cuts)))
        shifts[cut:] += shift
    return shifts


MIX = {"needle": 0.45, "tools": 0.2, "arithmetic": 0.2, "repeat": 0.15}
LENGTHS = {"tools": 768, "arithmetic": 96, "repeat": 256}
_SHARE_WITH_GAPS = {"needle": 0.6, "repeat": 0.3}


def _work(path: str, seed: int, lengths: tuple[int, ...], queue: multiprocessing.Queue) -> None:
    tokenizer, source = Tokenizer.from_file(path), random.Random(seed)
    while True:
        task = source.choices(list(MIX), list(MIX.values()))[0]
        queue.put(make_batch(tokenizer, source, task, LENGTHS.get(task) or source.choice(lengths)))


def batches(path: str, seed: int, lengths: tuple[int, ...], workers: int) -> Iterator[Batch]:
    """Training batches without end; needle texts of the given lengths.

    Each worker's stream depends on the seed alone, and batches are taken from the workers in turn.
    """
    context = multiprocessing.get_context("fork")
    queues = [context.Queue(maxsize=6) for _ in range(workers)]
    processes = [
        context.Process(target=_work, args=(path, seed * 1000 + index, lengths, queue), daemon=True)
        for index, queue in enumerate(queues)
    ]
    for process in processes:
        process.start()
    try:
        for queue in itertools.cycle(queues):
            yield queue.get()
    finally:
        for process in processes:
            process.kill()
