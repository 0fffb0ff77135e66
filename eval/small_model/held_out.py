"""How well the model in training does on chats that it never saw."""

import random

import numpy as np
import torch
from tokenizers import Tokenizer

from small_model.batches import LENGTHS, make_batch
from small_model.model import Mode, SmallModel

__all__ = ["exact_shares"]

_TOKENS_AT_ONCE = 16_384


@torch.no_grad()
def exact_shares(
    model: SmallModel, tokenizer: Tokenizer, mode: Mode, needle_lengths: tuple[int, ...], rows: int = 64
) -> dict[str, float]:
    """Share of held-out chats in which every token that the assistant says is the most likely one.

    Args:
        model: on any device.
        tokenizer: its own.
        mode: dense or sparse attention.
        needle_lengths: of the texts, in tokens.
        rows: chats of each kind.
    """
    device = model.lm_head.weight.device
    source = random.Random(12345)
    wanted = [(task, task, LENGTHS[task]) for task in ("tools", "arithmetic")]
    wanted += [(f"needle {length}", "needle", length) for length in needle_lengths]
    shares = {}
    for name, task, length in wanted:
        rights: list[bool] = []
        while len(rights) < rows:
            num = min(rows - len(rights), max(1, _TOKENS_AT_ONCE // length))
            batch = make_batch(tokenizer, source, task, length, num, "test")
            ids, positions = (torch.from_numpy(array).to(device) for array in (batch.ids, batch.positions))
            with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
                hidden, _ = model(ids, positions, mode)
                best = model.lm_head(hidden).argmax(-1).cpu().numpy()
            wrong = (best[:, :-1] != batch.ids[:, 1:]) & batch.spoken[:, 1:]
            rights += [not row.any() for row in wrong]
        shares[name] = round(float(np.mean(rights)), 3)
    return shares
