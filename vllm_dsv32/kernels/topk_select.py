"""Operation ``topk_select``: the positions of the K highest logits of each row."""

import torch

__all__ = ["reference"]


def reference(logits: torch.Tensor, num_keys: torch.Tensor, topk_pos: torch.Tensor) -> None:
    """Write the positions of the K highest of the first ``num_keys`` logits of each row.

    Exact. Ties: of equal logits the lower position wins. A NaN counts as -inf; -inf itself is a
    value like any other, chosen last. Order: ascending positions, then -1 in what is left over. So
    the result is a function of the logits alone, to the bit.

    Args:
        logits: float32 ``[T, L]``; what lies at or past ``num_keys`` is not read.
        num_keys: int32 ``[T]``, at most L.
        topk_pos: int32 ``[T, K]``, overwritten.
    """
    k = topk_pos.shape[1]
    position = torch.arange(logits.shape[1], device=logits.device)
    visible = position < num_keys.unsqueeze(-1)
    ranked = torch.where(visible & ~logits.isnan(), logits, -torch.inf)
    # Stable on (visible, logit) descending: two stable sorts, the less significant key first.
    by_logit = ranked.sort(dim=-1, descending=True, stable=True).indices
    by_visible = visible.gather(1, by_logit).long().sort(dim=-1, descending=True, stable=True).indices
    best = by_logit.gather(1, by_visible)[:, :k]
    chosen = torch.where(visible.gather(1, best), best, logits.shape[1]).sort(dim=-1).values
    topk_pos.fill_(-1)
    topk_pos[:, : chosen.shape[1]] = torch.where(chosen < logits.shape[1], chosen, -1).to(topk_pos.dtype)
