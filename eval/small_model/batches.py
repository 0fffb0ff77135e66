"""From chats to batches of token ids, made by worker processes while the model trains."""

import itertools
import multiprocessing
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from small_model.tasks import Chat, about_tokens, arithmetic, needle, repeat, tool_loop
from vllm_dsv32.serving.encoding import encode_messages
from vllm_dsv32.tools.tiny_tokenizer import EOS_TOKEN

__all__ = ["Batch", "batches", "make_batch", "tokenise"]

FURTHEST_POSITION = 18_000
MIX = {"needle": 0.4, "tools": 0.2, "arithmetic": 0.25, "repeat": 0.15}
LENGTHS = {"tools": 768, "arithmetic": 96, "repeat": 256}
SHARE_WITH_GAPS = {"needle": 0.7, "repeat": 0.3}


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
    tokenizer: Tokenizer, source: random.Random, task: str, length: int, rows: int, split: str = "train"
) -> Batch:
    """A batch of ``rows`` chats of one task, at most ``length`` tokens each."""
    make = _maker(source, task, length, split)
    ids, spoken = np.full((rows, length), 2, dtype=np.int64), np.zeros((rows, length), dtype=bool)
    positions = np.tile(np.arange(length, dtype=np.int64), (rows, 1))
    for row in range(rows):
        while True:
            row_ids, row_spoken = tokenise(tokenizer, make())
            if len(row_ids) <= length:
                break
        ids[row, : len(row_ids)], spoken[row, : len(row_ids)] = row_ids, row_spoken
        if split == "train" and source.random() < SHARE_WITH_GAPS.get(task, 0.0):
            positions[row] += _gaps(source, length)
    return Batch(task, ids, positions, spoken)


def _maker(source: random.Random, task: str, length: int, split: str) -> Callable[[], Chat]:
    if task == "tools":
        return lambda: tool_loop(source, split)
    if task == "arithmetic":
        return lambda: arithmetic(source, split)
    if task == "repeat":
        return lambda: repeat(source, source.randrange(4, length // 6))

    def make() -> Chat:
        if split == "test":
            return needle(source, split, length - 135, about_tokens)
        # Many questions teach most, few leave most of the text to what has nothing to do with them.
        most = max(1, min(12, length // 220))
        num_questions = source.choice((1, source.randint(1, most), most))
        room = length - 60 - 75 * num_questions
        return needle(source, split, int(room * source.uniform(0.5, 1)), about_tokens, num_questions)

    return make


def _gaps(source: random.Random, length: int) -> np.ndarray:
    """Non-decreasing shifts: the text stands in pieces, far apart, in a longer one that is not there."""
    shifts = np.zeros(length, dtype=np.int64)
    # The larger of two, because what is asked of the longest texts is asked at their far end.
    total = int((FURTHEST_POSITION - length) * max(source.random(), source.random()))
    cuts = sorted(source.randrange(1, length) for _ in range(source.randint(1, 5)))
    sizes = sorted(source.randint(0, total) for _ in cuts[1:])
    for cut, shift in zip(cuts, [*sizes, total], strict=True):
        shifts[cut:] = shift
    return shifts


def batches(
    path: str, seed: int, lengths: Callable[[int], tuple[int, ...]], tokens: int, first_step: int, workers: int
) -> Iterator[Batch]:
    """Training batches without end.

    A batch depends on the seed and its step alone, however many processes make them and wherever they begin.

    Args:
        path: of the tokenizer.
        seed: of the whole training.
        lengths: of needle texts, by step.
        tokens: of a batch.
        first_step: where to begin.
        workers: processes.
    """

    def work(first: int, queue: multiprocessing.Queue) -> None:
        tokenizer = Tokenizer.from_file(path)
        for step in itertools.count(first, workers):
            source = random.Random(f"{seed} {step}")
            task = source.choices(list(MIX), list(MIX.values()))[0]
            length = LENGTHS.get(task) or source.choice(lengths(step))
            queue.put(make_batch(tokenizer, source, task, length, max(1, tokens // length)))

    context = multiprocessing.get_context("fork")
    queues = [context.Queue(maxsize=6) for _ in range(workers)]
    processes = [
        context.Process(target=work, args=(first_step + index, queue), daemon=True)
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
