"""Operation ``topk_select``: the positions of the K highest logits of each row."""

import torch

__all__ = ["reference"]


def reference(logits: torch.Tensor, num_keys: torch.Tensor, topk_pos: torch.Tensor) -> None:
    """Write the positions of the K highest of the first ``num_keys`` logits of each row.

    Exact. Ties: of equal logits the lower position wins. A NaN counts as -inf; -inf itself is a
    value like any other, chosen last. Order: ascending positions, then -1 in what is left over. So
    the result is a function of the logits alone, to the bit.

    Args:
        logits: float32 ``[T, L]``; what lies at or past ``num_keys`` is not read, and of a row that sees no
            more than K all is selected, whatever its logits.
        num_keys: int32 ``[T]``, at most L.
        topk_pos: int32 ``[T, K]``, overwritten.
    """
    num_rows, length = logits.shape
    k = min(topk_pos.shape[1], length)
    topk_pos.fill_(-1)
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
