"""Selection for a long prefill, shared among tensor-parallel ranks.

Every rank holds all index keys and all index heads, because their scores are summed over heads, and so would score
every key for every token: of all the work on a long context the only part that tensor parallelism does not divide.
But tokens are selected for one by one. So each rank selects for a part of them, and the slots are gathered: 8 KiB
a token against 16 KFLOP for each of its keys. A slot is the same on every rank: one scheduler gives out the pages,
so that the ranks of a group have equal block tables.

Later tokens see more keys. Tokens are dealt in strips, round by round, so that the parts are alike; those of a
strip are neighbours, which share the keys that they are scored against.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from vllm.logger import init_logger

from vllm_dsv32.kernels.dispatch import KernelSet
from vllm_dsv32.kernels.selection import select

__all__ = ["SelectionShare", "select_shared"]

logger = init_logger("vllm.plugins.dsv32")

_MAX_STRIP = 64
"""Tokens. Fewer where there are not so many for each rank."""


@dataclass(frozen=True)
class SelectionShare:
    """One rank's part in a group that selects for the same tokens."""

    rank: int
    size: int
    """Ranks of the group."""
    gather: Callable[[torch.Tensor], torch.Tensor]
    """float32 ``[n, K]`` of each rank to ``[size * n, K]``, in the order of ranks, to the bit."""
    worth_from: int | None
    """Tokens times keys from which on it is worth its costs; None: never."""

    def takes(self, num_tokens: int, max_query_len: int, max_num_keys: int) -> bool:
        """Whether a batch's selection is shared, which every rank has to answer alike; decoding is never."""
        if self.size == 1 or self.worth_from is None or max_query_len < _MAX_STRIP:
            return False
        return num_tokens * max_num_keys >= self.worth_from

    def rows(self, num_tokens: int, device: torch.device) -> torch.Tensor:
        """The tokens of this rank, int64 ``[n]``, ascending.

        n is the same on every rank: what the last round lacks is made up by the last token, once more each time.
        """
        return _rows(self.rank, self.size, num_tokens, device)

    def collect(self, part: torch.Tensor, whole: torch.Tensor) -> None:
        """Write the results of every rank's :meth:`rows` to where their tokens are in ``whole``."""
        num_tokens, k = whole.shape
        strip = _strip(num_tokens, self.size)
        # vLLM's all-gather through the memory that CPUs share takes floating-point numbers alone.
        gathered = self.gather(part.view(torch.float32)).view(part.dtype)
        dealt = gathered.view(self.size, -1, strip, k).transpose(0, 1)
        num_whole_rounds = num_tokens // (strip * self.size)
        end = num_whole_rounds * self.size * strip
        whole[:end].view(num_whole_rounds, self.size, strip, k).copy_(dealt[:num_whole_rounds])
        if end < num_tokens:
            whole[end:].copy_(dealt[-1].reshape(-1, k)[: num_tokens - end])


def _strip(num_tokens: int, size: int) -> int:
    """Tokens of a strip: as many as fit whole rounds of at most ``_MAX_STRIP`` with the fewest left over."""
    num_rounds = -(-num_tokens // (_MAX_STRIP * size))
    return -(-num_tokens // (num_rounds * size))


@lru_cache(maxsize=4)  # every layer of a step asks the same
def _rows(rank: int, size: int, num_tokens: int, device: torch.device) -> torch.Tensor:
    strip = _strip(num_tokens, size)
    num_rounds = -(-num_tokens // (strip * size))
    dealt = torch.arange(num_rounds * size * strip, device=device).view(num_rounds, size, strip)
    return dealt[:, rank].reshape(-1).clamp(max=num_tokens - 1)


def select_shared(
    share: SelectionShare,
    kernels: KernelSet,
    q_fp8: torch.Tensor,
    weights: torch.Tensor,
    index_cache: torch.Tensor,
    index_block_table: torch.Tensor,
    request_ids: torch.Tensor,
    num_keys: torch.Tensor,
    num_scored: torch.Tensor,
    max_num_keys: int,
    block_table: torch.Tensor,
    block_size: int,
    topk_slot: torch.Tensor,
) -> None:
    """See :func:`vllm_dsv32.kernels.selection.select`; called on every rank of the group, with the same batch."""
    logger.info_once("Tensor-parallel ranks share the selection of long prefills: %d ranks", share.size)
    rows = share.rows(len(topk_slot), topk_slot.device)
    part = topk_slot.new_empty((len(rows), topk_slot.shape[1]))
    select(
        kernels,
        q_fp8.view(torch.uint8)[rows].view(q_fp8.dtype),
        weights[rows],
        index_cache,
        index_block_table,
        request_ids[rows],
        num_keys[rows],
        num_scored[rows],
        max_num_keys,
        block_table,
        block_size,
        part,
    )
    share.collect(part, topk_slot)
