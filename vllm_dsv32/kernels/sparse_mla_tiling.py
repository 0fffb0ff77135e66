"""What is tuned of ``sparse_mla`` in Triton, and its only home."""

from dataclasses import dataclass

import torch

__all__ = ["Tiling", "tiling"]


@dataclass(frozen=True)
class Tiling:
    """What is tuned for a GPU and a shape; no choice changes what is computed, but for the order of sums."""

    num_heads: int
    """Of a program: they share the rows that it reads. Their accumulators must fit into registers."""
    num_keys: int
    """Of a tile; a multiple of eight for each warp."""
    programs_per_sm: int
    """That run at once: so many splits fill the GPU."""
    num_warps: int = 4
    num_stages: int = 1
    """Three: the next tile is copied to shared memory meanwhile."""
    max_registers: int | None = None
    """Of a thread; a few that do not fit are worth another program on each multiprocessor."""
    num_adjacent: int = 2
    """See :func:`vllm_dsv32.kernels.triton_latent.scoring_rows`."""


_FEW_TOKENS = 32
"""Up to so many, splits fill the GPU, and each has few tiles: what counts is how soon the first is there."""


def tiling(
    capability: tuple[int, int] | None, num_heads: int, fp8: bool, dtype: torch.dtype, num_tokens: int
) -> Tiling:
    """The tiles of a launch, so that they fit the shared memory and the registers.

    Where rows are decoded, or the compiler cannot copy them in the background, programs on one multiprocessor
    hide each other's latency.

    Args:
        capability: of the GPU; None for Triton's interpreter.
        num_heads: on this rank.
        fp8: whether the cache is ``fp8_ds_mla``.
        dtype: of the queries.
        num_tokens: of the batch.
    """
    heads = max(8, 1 << (num_heads - 1).bit_length())
    if capability is None:
        return Tiling(min(heads, 16), 16, programs_per_sm=4, num_warps=1)
    if dtype == torch.float32:
        return Tiling(4, 32, programs_per_sm=4)
    if capability[0] == 9:
        return _on_hopper(heads, fp8, num_tokens)
    if capability[0] != 10:
        return Tiling(min(heads, 16), 64 if fp8 else 32, programs_per_sm=2, num_adjacent=4)
    if fp8 and heads > 16:
        return Tiling(32, 128, programs_per_sm=1, num_warps=8)
    return Tiling(16, 64, programs_per_sm=3 if fp8 else 2, max_registers=168 if fp8 else None)


def _on_hopper(heads: int, fp8: bool, num_tokens: int) -> Tiling:
    """The fastest of those tried on an H200; Triton needs 16 heads to use the tensor cores at full width."""
    if fp8:
        if heads <= 16:
            return Tiling(16, 64, programs_per_sm=3, max_registers=168)
        return Tiling(min(heads, 64), 128, programs_per_sm=1, num_warps=8)
    if heads > 32:
        return Tiling(64, 64, programs_per_sm=1, num_warps=8, num_stages=2)
    if heads > 16:
        return Tiling(32, 64, programs_per_sm=1, num_stages=3)
    if num_tokens <= _FEW_TOKENS:
        return Tiling(16, 64, programs_per_sm=1, num_stages=2)
    return Tiling(16, 32, programs_per_sm=3, num_stages=2)
