"""Operation ``token_keys``: what each token of a batch sees, from what vLLM knows of its requests."""

import torch

__all__ = ["reference"]


def reference(
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    topk: int,
    request_ids: torch.Tensor,
    num_keys: torch.Tensor,
    num_scored: torch.Tensor,
    num_selected: torch.Tensor,
) -> None:
    """Write the request of each token, and how many positions it sees, scores and attends to.

    A token that sees no more than ``topk`` positions attends to all of them: none has to be scored.

    Args:
        query_start_loc: int32 ``[R + 1]``; request r has the tokens from ``[r]`` up to ``[r + 1]``. Tokens
            from ``[R]`` on are padding.
        seq_lens: int32 ``[R]``: positions of each request, this step's tokens included; 0 for padding.
        topk: K.
        request_ids: int32 ``[T]``, overwritten; the last request for padding.
        num_keys: int32 ``[T]``, overwritten: the positions up to and with the token's own; 0 for padding.
        num_scored: int32 ``[T]``, overwritten: ``num_keys`` where that is above ``topk``, else 0.
        num_selected: int32 ``[T]``, overwritten: ``num_keys``, at most ``topk``.
    """
    num_requests = seq_lens.shape[0]
    token = torch.arange(request_ids.shape[0], dtype=torch.int32, device=request_ids.device)
    ends = query_start_loc[1:]
    request = torch.searchsorted(ends, token, right=True)
    is_padding = request >= num_requests
    request.clamp_(max=num_requests - 1)
    request_ids.copy_(request)
    num_keys.copy_((seq_lens[request] - (ends[request] - 1 - token)).clamp(min=0).masked_fill(is_padding, 0))
    num_scored.copy_(num_keys.masked_fill(num_keys <= topk, 0))
    num_selected.copy_(num_keys.clamp(max=topk))
