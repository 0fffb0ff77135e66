"""Operation ``index_logits``: the indexer's score of every visible key."""

import torch

from vllm_dsv32.layout import index_key_views

__all__ = ["reference"]

_WORKSPACE_NBYTES = 64 << 20
"""Bound on the per-head scores that the reference holds at once."""


def reference(
    q_fp8: torch.Tensor,
    weights: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    request_ids: torch.Tensor,
    num_keys: torch.Tensor,
    max_num_keys: int,
) -> torch.Tensor:
    """``I[t, s] = sum_h weights[t, h] * relu(q_fp8[t, h] . k[s])`` for ``s < num_keys[t]``.

    One contract for prefill and decode: keys are read through the block table, and a row sees the
    first ``num_keys`` positions of its request.

    Args:
        q_fp8: float8_e4m3fn ``[T, H, D]``.
        weights: float32 ``[T, H]``, with all scales folded in.
        cache: uint8 of nominal shape ``[num_blocks, block_size, 132]``.
        block_table: int32 ``[R, max_blocks]``; entries past a request's last block are never read.
        request_ids: int32 ``[T]``, rows of ``block_table``; tokens of one request are adjacent.
        num_keys: int32 ``[T]``, 0 for padding.
        max_num_keys: at least ``max(num_keys)``; the width of the result.

    Returns:
        float32 ``[T, max_num_keys]``; what lies at or past ``num_keys[t]`` is unspecified.
    """
    logits = q_fp8.new_full((q_fp8.shape[0], max_num_keys), -torch.inf, dtype=torch.float32)
    views = index_key_views(cache)
    block_size = cache.shape[1]
    requests, counts = torch.unique_consecutive(request_ids, return_counts=True)
    begin = 0
    for request, count in zip(requests.tolist(), counts.tolist(), strict=True):
        rows = slice(begin, begin + count)
        begin += count
        seen = int(num_keys[rows].max())
        if seen == 0:
            continue
        blocks = block_table[request, : -(-seen // block_size)].long()
        keys = views.key_fp8[blocks].float() * views.key_scale[blocks].unsqueeze(-1)
        scores = _scores(q_fp8[rows], weights[rows], keys.flatten(0, 1)[:seen])
        visible = torch.arange(seen, device=scores.device) < num_keys[rows].unsqueeze(-1)
        logits[rows, :seen] = scores.masked_fill(~visible, -torch.inf)
    return logits


def _scores(q_fp8: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """The equation for the tokens of one request: ``[t, H, D]``, ``[t, H]``, ``[s, D]`` to ``[t, s]``."""
    step = max(1, _WORKSPACE_NBYTES // (4 * q_fp8.shape[1] * keys.shape[0]))
    chunks = [
        torch.einsum("th,ths->ts", w, torch.relu(torch.einsum("thd,sd->ths", q.float(), keys)))
        for q, w in zip(q_fp8.split(step), weights.split(step), strict=True)
    ]
    return torch.cat(chunks)
