"""Scoring and selecting with a bound on the logits that are held at once."""

import torch

from vllm_dsv32.kernels.dispatch import KernelSet

__all__ = ["LOGITS_NBYTES", "select"]

LOGITS_NBYTES = 512 << 20
"""Bound on the index logits that are held at once, vLLM's own; longer batches are scored in chunks of rows."""


def select(
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
    """Write the slots that each token attends to.

    A token that sees no more than K is neither scored nor selected for, whatever the rest of its batch sees.

    Args:
        kernels: ``index_logits`` and ``topk_select`` of them are used, under whose contracts the arguments are
            explained.
        q_fp8: float8_e4m3fn ``[T, H, D]``.
        weights: float32 ``[T, H]``.
        index_cache: the index-key cache.
        index_block_table: int32 ``[R, max_blocks]``, its pages.
        request_ids: int32 ``[T]``.
        num_keys: int32 ``[T]``.
        num_scored: int32 ``[T]``, as ``token_keys`` writes it.
        max_num_keys: at least ``max(num_keys)``.
        block_table: int32 ``[R, max_blocks]``, pages of the latent cache, which the slots are in.
        block_size: of the latent cache.
        topk_slot: int32 ``[T, K]``, overwritten.
    """
    num_tokens, k = topk_slot.shape
    step = max(1, LOGITS_NBYTES // (4 * max(1, max_num_keys)))
    for begin in range(0, num_tokens, step):
        rows = slice(begin, begin + step)
        if max_num_keys > k:
            logits = kernels.index_logits(
                q_fp8[rows],
                weights[rows],
                index_cache,
                index_block_table,
                request_ids[rows],
                num_scored[rows],
                max_num_keys,
            )
        else:  # which rows of so few keys do not read: one for all
            logits = weights.new_empty(k).expand(topk_slot[rows].shape[0], k)[:, :max_num_keys]
        kernels.topk_select(logits, num_keys[rows], request_ids[rows], block_table, block_size, topk_slot[rows])
