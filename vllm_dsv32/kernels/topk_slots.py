"""Operation ``topk_slots``: from positions in a sequence to slots of the paged cache."""

import torch

__all__ = ["reference"]


def reference(
    topk_pos: torch.Tensor,
    request_ids: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``slot = block_table[request, pos // block_size] * block_size + pos % block_size``.

    Args:
        topk_pos: int32 ``[T, K]``, the valid ones first, then -1.
        request_ids: int32 ``[T]``, rows of ``block_table``.
        block_table: int32 ``[R, max_blocks]``.
        block_size: tokens a block.

    Returns:
        ``topk_slot``, int32 ``[T, K]``, -1 where ``topk_pos`` is, and ``num_valid``, int32 ``[T]``.
    """
    valid = topk_pos >= 0
    pos = topk_pos.clamp(min=0).long()
    blocks = block_table[request_ids.long().unsqueeze(-1), pos // block_size]
    slots = blocks.long() * block_size + pos % block_size
    return torch.where(valid, slots, -1).to(torch.int32), valid.sum(dim=-1, dtype=torch.int32)
