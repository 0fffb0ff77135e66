"""Operation ``topk_select`` for SM 90 in CUDA C++: from logits to slots in one launch.

The blocks of a cluster divide a row, and one of them joins what they have found, in each other's shared memory: no
second launch, no memory between two, no counters. A row that one block holds is left to it.
"""

from dataclasses import dataclass
from functools import cache

import torch

from vllm_dsv32.kernels import cuda_library

__all__ = ["CAPACITY", "CLUSTER_SIZES", "MAX_TOPK", "NUM_VARIANTS", "Tiling", "tiling", "topk_select"]

MAX_TOPK = 2048
CAPACITY = 8192
"""Keys that a block holds: rows of no more need no cluster."""
CLUSTER_SIZES = (1, 2, 4, 8, 16)
"""Blocks of a cluster; more than eight need the GPU's leave, which SM 90 gives."""
NUM_VARIANTS = 3
"""Blocks of 1024 threads; of 512; and of 512 with half the registers, two to a multiprocessor."""

_DEPENDENT = False
"""Whether a launch may begin while the last kernel of the stream ends."""


@dataclass(frozen=True)
class Tiling:
    """What is chosen for a launch; no choice changes what is selected."""

    cluster_size: int
    variant: int


@cache
def tiling(num_rows: int, length: int, concurrency: tuple[tuple[int, ...], ...]) -> Tiling:
    """The one place to tune: so that the launch is over soonest, by what its parts should take.

    Args:
        num_rows: of the launch.
        length: of the longest row; the host knows no more.
        concurrency: of each variant, the clusters of each of CLUSTER_SIZES that the GPU runs at once; zero where it
            runs none.
    """

    def nanoseconds(cluster_size: int, variant: int, num_concurrent: int) -> float:
        num_waves = -(-num_rows // num_concurrent)
        start = (2700, 2500, 2800)[variant] + (400 + 100 * cluster_size.bit_length() if cluster_size > 1 else 0)
        num_active = min(num_rows, num_concurrent) * cluster_size
        # What a block reads when it is alone; and its part of what the memory delivers.
        per_key = max((0.08, 0.1, 0.1)[variant], num_active / 1100)
        return num_waves * (start + length / cluster_size * per_key)

    candidates = [
        (nanoseconds(cluster_size, variant, num_concurrent), variant, cluster_size)
        for variant in range(NUM_VARIANTS)
        for cluster_size, num_concurrent in zip(CLUSTER_SIZES, concurrency[variant], strict=True)
        if num_concurrent and (cluster_size == 1 or length > CAPACITY)
    ]
    _, variant, cluster_size = min(candidates)
    return Tiling(cluster_size, variant)


def topk_select(
    logits: torch.Tensor,
    num_keys: torch.Tensor,
    request_ids: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
    topk_slot: torch.Tensor,
) -> None:
    """Write the slots of the K highest of the first ``num_keys`` logits of each row.

    Exact. Ties: of equal logits the lower position wins. A NaN counts as -inf; -inf itself is a value like any
    other. Order: ascending positions, then -1. So the result is a function of the inputs, to the bit.

    Args:
        logits: float32 ``[T, L]``, rows dense; what lies at or past ``num_keys`` is not read, and of a row that
            sees no more than K all is selected, unread. Rows are read fastest from multiples of 16 bytes on.
        num_keys: int32 ``[T]``.
        request_ids: int32 ``[T]``, rows of ``block_table``.
        block_table: int32 ``[R, max_blocks]``, rows dense; read for what is selected.
        block_size: tokens a block.
        topk_slot: int32 ``[T, K]``, contiguous, overwritten.

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
    chosen = tiling(num_rows, length, _concurrency(logits.device))
    torch.ops.vllm_dsv32.topk_select(
        logits,
        num_keys,
        request_ids,
        block_table,
        block_size,
        chosen.cluster_size,
        chosen.variant,
        _DEPENDENT,
        topk_slot,
    )


@cache
def _concurrency(device: torch.device) -> tuple[tuple[int, ...], ...]:
    """Of each variant, clusters of each of CLUSTER_SIZES that the GPU runs at once."""
    with torch.cuda.device(device):
        return tuple(
            tuple(torch.ops.vllm_dsv32.topk_select_concurrency(size, variant) for size in CLUSTER_SIZES)
            for variant in range(NUM_VARIANTS)
        )
