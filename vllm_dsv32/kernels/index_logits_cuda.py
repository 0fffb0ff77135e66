"""Operation ``index_logits`` for SM 90 in CUDA C++: prefill with 64 heads, in one launch.

A block has the queries of eight adjacent rows and walks over tiles of their keys; all tiles of all rows are divided
evenly among as many blocks as there are multiprocessors. Rows of another request in a tile of rows are computed in
vain, so requests of few rows are Gluon's.
"""

import torch

from vllm_dsv32.kernels import cuda_library, index_logits_gluon, index_logits_triton

__all__ = ["MIN_ROWS", "NUM_HEADS", "index_logits"]

NUM_HEADS = 64
MIN_ROWS = 8
"""Of a request, on average: a tile of rows. With fewer, most of a tile would be computed in vain."""


def index_logits(
    q_fp8: torch.Tensor,
    weights: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    request_ids: torch.Tensor,
    num_keys: torch.Tensor,
    max_num_keys: int,
) -> torch.Tensor:
    """See :func:`vllm_dsv32.kernels.index_logits.reference`; heads and dimensions are summed in another order.

    The Gluon kernel scores what this one does not take: batches with less than 8 rows a request, and caches with
    blocks or pages that are neither's, which Gluon leaves to Triton.

    Raises:
        ValueError: queries have other than 64 heads.
        RuntimeError: the library was not built; or a tensor is of another type, shape or layout.
    """
    num_rows, num_heads, _ = q_fp8.shape
    if num_heads != NUM_HEADS:
        raise ValueError(f"index_logits in CUDA takes {NUM_HEADS} heads, got {num_heads}; choose triton")
    cuda_library.require()
    if num_rows < MIN_ROWS * block_table.shape[0] or not index_logits_gluon.takes(cache):
        return index_logits_gluon.index_logits(
            q_fp8, weights, cache, block_table, request_ids, num_keys, max_num_keys
        )
    logits = index_logits_triton.new_logits(num_rows, max_num_keys, q_fp8.device)
    if logits.numel() > 0:
        torch.ops.vllm_dsv32.index_logits(q_fp8, weights, cache, block_table, request_ids, num_keys, logits)
    return logits
