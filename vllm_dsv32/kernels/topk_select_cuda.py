"""Operation ``topk_select`` for SM 90 in CUDA C++: from logits to slots in one launch.

The blocks of a cluster divide a row, and one of them joins what they have found, in each other's shared memory: no
second launch, no memory between two, no counters. A row that one block holds is left to it.

Blocks are as large as a multiprocessor, which suits the few rows of a decode step, and long rows. Many short rows,
as in a prefill, are Triton's, whose programs share one.
"""

from functools import cache

import torch

from vllm_dsv32.kernels import cuda_library, topk_select_triton

__all__ = [
    "CAPACITY",
    "CLUSTER_SIZES",
    "LONG_ROW",
    "MAX_TOPK",
    "MAX_WAVES",
    "SCRATCH_NBYTES",
    "cluster_size",
    "topk_select",
]

MAX_TOPK = 2048
CAPACITY = 8192
"""Keys that a block holds; of longer rows it lists what may be selected first."""
CLUSTER_SIZES = (1, 2, 4, 8)
"""Blocks of a cluster."""
MAX_WAVES = 2
"""Rows for each multiprocessor; more are left to Triton."""
LONG_ROW = 32768
"""Keys; from so many on no number of rows is."""
SCRATCH_NBYTES = topk_select_triton.SCRATCH_NBYTES
"""Of what is left to Triton."""

_KEYS_OF_BLOCK = 12288
"""The fewest that are worth a block of their own: dividing a row costs barriers among the blocks."""


@cache
def cluster_size(num_rows: int, length: int, concurrency: tuple[int, ...]) -> int:
    """Among how many blocks to divide a row; the one place to tune. No choice changes what is selected.

    Args:
        num_rows: clusters of the launch.
        length: of the longest row; the host knows no more.
        concurrency: clusters of each of CLUSTER_SIZES that the GPU runs at once; zero where it runs none.
    """
    candidates = zip(CLUSTER_SIZES, concurrency, strict=True)
    return max(
        (size for size, count in candidates if size * _KEYS_OF_BLOCK <= length and num_rows <= count), default=1
    )


def topk_select(
    logits: torch.Tensor,
    num_keys: torch.Tensor,
    request_ids: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
    topk_slot: torch.Tensor,
) -> None:
    """See :func:`vllm_dsv32.kernels.topk_select.reference`; the same result to the bit.

    Logits are read fastest where their rows begin at multiples of 16 bytes.

    Raises:
        ValueError: K is larger than 2048.
        RuntimeError: the library was not built; or a tensor is of another type, shape or layout.
    """
    num_rows, length = logits.shape
    k = topk_slot.shape[1]
    if k > MAX_TOPK:
        raise ValueError(f"topk_select in CUDA takes a top-k of at most {MAX_TOPK}, got {k}; choose triton")
    cuda_library.require()
    if num_rows == 0 or k == 0:
        return
    concurrency = _concurrency(logits.device)
    if num_rows > MAX_WAVES * concurrency[0] and length < LONG_ROW:
        topk_select_triton.topk_select(logits, num_keys, request_ids, block_table, block_size, topk_slot)
        return
    size = cluster_size(num_rows, length, concurrency)
    torch.ops.vllm_dsv32.topk_select(logits, num_keys, request_ids, block_table, block_size, size, topk_slot)


@cache
def _concurrency(device: torch.device) -> tuple[int, ...]:
    """Clusters of each of CLUSTER_SIZES that the GPU runs at once: the processors of a cluster lie together."""
    with torch.cuda.device(device):
        return tuple(torch.ops.vllm_dsv32.topk_select_concurrency(size) for size in CLUSTER_SIZES)
