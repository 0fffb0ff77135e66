"""Operation ``topk_select``: the cache slots of the K highest logits of each row."""

import torch

__all__ = ["reference", "slots_of"]


def reference(
    logits: torch.Tensor,
    num_keys: torch.Tensor,
    request_ids: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
    topk_slot: torch.Tensor,
) -> None:
    """Write the slots of the K highest of the first ``num_keys`` logits of each row.

    ``slot = block_table[request, position // block_size] * block_size + position % block_size``, for the columns
    that are selected as positions in the row's request.

    Exact. Ties: of equal logits the lower position wins. A NaN counts as -inf; -inf itself is a
    value like any other, chosen last. Order: ascending positions, then -1 in what is left over. So
    the result is a function of the logits and the table alone, to the bit.

    Args:
        logits: float32 ``[T, L]``; what lies at or past ``num_keys`` is not read, and of a row that sees no
            more than K all is selected, whatever its logits.
        num_keys: int32 ``[T]``, at most L.
        request_ids: int32 ``[T]``, rows of ``block_table``.
        block_table: int32 ``[R, max_blocks]``, of the cache that the slots are in; read for what is selected only.
        block_size: tokens a block.
        topk_slot: int32 ``[T, K]``, overwritten; the first ``min(num_keys, K)`` of a row are slots.
    """
    topk_pos = torch.full_like(topk_slot, -1)
    _select(logits, num_keys, topk_pos)
    topk_slot.copy_(slots_of(topk_pos, request_ids, block_table, block_size))


def _select(logits: torch.Tensor, num_keys: torch.Tensor, topk_pos: torch.Tensor) -> None:
    """Write the positions, ascending, over as many of the -1."""
    num_rows, length = logits.shape
    k = min(topk_pos.shape[1], length)
    if num_rows == 0 or k == 0:
        return
    visible = torch.arange(length, device=logits.device) < num_keys.unsqueeze(-1)
    ranked = torch.where(visible & ~logits.isnan(), logits, -torch.inf)
    lowest = ranked.topk(k, dim=-1).values[:, -1:]
    chosen = ranked > lowest
    tied = (ranked == lowest) & visible
    room = k - chosen.sum(-1, keepdim=True)
    crowded = (tied.sum(-1, keepdim=True) > room).squeeze(-1)
    tied[crowded] &= tied[crowded].cumsum(-1, dtype=torch.int32) <= room[crowded]
    chosen |= tied
    row, position = chosen.nonzero(as_tuple=True)
    num_chosen = chosen.sum(-1)
    rank = torch.arange(len(row), device=row.device) - (num_chosen.cumsum(0) - num_chosen)[row]
    topk_pos[row, rank] = position.to(topk_pos.dtype)


def slots_of(
    topk_pos: torch.Tensor, request_ids: torch.Tensor, block_table: torch.Tensor, block_size: int
) -> torch.Tensor:
    """int32 ``[T, K]``: the slot of each position, -1 where that is -1; arguments as in :func:`reference`."""
    valid = topk_pos >= 0
    pos = topk_pos.clamp(min=0).long()
    block = block_table[request_ids.long().unsqueeze(-1), pos // block_size].long()
    return torch.where(valid, block * block_size + pos % block_size, -1).to(torch.int32)
