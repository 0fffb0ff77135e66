"""What four adjacent tokens have selected between them, for :mod:`vllm_dsv32.kernels.sparse_mla_cuda_union`."""

from dataclasses import dataclass

import torch

from vllm_dsv32.kernels.triton_device import ceil_div
from vllm_dsv32.layout import LATENT_DIM

__all__ = ["GROUP", "MAX_SLOTS", "PLACED_NBYTES", "Places", "Unions", "unite"]

GROUP = 4
"""Adjacent tokens of a union."""
MAX_SLOTS = 2048
"""Of a token: kMaxUnionSlots of csrc/slot_union_sm90.h."""
PLACED_NBYTES = 256 << 20
"""Bound on the pages that are decoded at once."""

_KEYS = 64
"""Of a tile."""


@dataclass(frozen=True)
class Places:
    """For the pages that unions name, so that each is decoded once. The first union to name a page gives it one."""

    table: torch.Tensor
    """int32 ``[1 + num_blocks]``: how many are given away, and the place of each page from 1 on, or 0."""
    pages: torch.Tensor
    """int32 ``[C]``: the page of each place. If there are more than C, no group is united after all."""
    block_size: int

    @classmethod
    def for_cache(cls, cache: torch.Tensor) -> "Places":
        """Of a cache ``[num_blocks, block_size, width]``."""
        num_blocks, block_size, _ = cache.shape
        capacity = min(num_blocks, PLACED_NBYTES // (2 * LATENT_DIM * block_size))
        table = torch.zeros(1 + num_blocks, dtype=torch.int32, device=cache.device)
        return cls(table, table.new_empty(capacity), block_size)

    @classmethod
    def none(cls, device: torch.device) -> "Places":
        """Where slots stay what they are."""
        empty = torch.empty(0, dtype=torch.int32, device=device)
        return cls(empty, empty, 1)


@dataclass(frozen=True)
class Unions:
    """Of G groups of tokens that have up to K slots each."""

    slots: torch.Tensor
    """int32 ``[G, 4 K]``, of the cache or of the places; in the order of the tokens, then of theirs."""
    num_slots: torch.Tensor
    """int32 ``[G]``: how many are valid, or -1 of a group that is not united."""
    seen: torch.Tensor
    """int64 ``[G, ceil(4 K / 64), 4]``: of each token, which of 64 slots it has.

    Of these, bit ``16 t + b`` is of slot ``8 (b // 2) + 2 t + b % 2``, and past the number zero. Tiles past that
    are not written.
    """
    num_left: torch.Tensor
    """int32 ``[4 G]``: ``num_valid`` of tokens that are not united, -1 of those that are."""


def unite(topk_slot: torch.Tensor, num_valid: torch.Tensor, max_share: float, places: Places) -> Unions:
    """Unite the slots of each group that shares enough of them.

    A slot that some tokens have is in the union once, and as often again as some token has it again: what a token
    has again is its own.

    Args:
        topk_slot: int32 ``[4 G, K]``, K up to 2048; slots past ``num_valid`` are not read.
        num_valid: int32 ``[4 G]``, 0 to K.
        max_share: of the slots that the tokens of a group have, counted one by one, how many its union may have.
            A group is not united either if its first two tokens have ``max_share + 1/4`` of theirs or more.
        places: of the pages; their table is written to.
    """
    num_groups, num_slots = topk_slot.shape[0] // GROUP, topk_slot.shape[1] * GROUP
    unions = Unions(
        slots=topk_slot.new_empty((num_groups, num_slots)),
        num_slots=topk_slot.new_empty(num_groups),
        seen=topk_slot.new_empty((num_groups, ceil_div(num_slots, _KEYS), GROUP), dtype=torch.int64),
        num_left=topk_slot.new_empty(num_groups * GROUP),
    )
    torch.ops.vllm_dsv32.slot_union(
        topk_slot.contiguous(),
        num_valid.contiguous(),
        max_share,
        places.block_size,
        unions.slots,
        unions.num_slots,
        unions.seen,
        unions.num_left,
        places.table,
        places.pages,
    )
    return unions
