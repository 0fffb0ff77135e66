"""Splitting the keys of a token among programs of ``sparse_mla``, and joining their results, in Triton.

A step of few tokens cannot fill a GPU with one program for each. The results are joined by a second launch: the
last program of a token could do it in the same one, but alone, reading up to a megabyte, while a launch spreads
that over the GPU, needs no counters that an aborted graph leaves behind, and orders memory on every architecture.
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
import triton
import triton.language as tl

from vllm_dsv32.kernels.triton_compilation import Compilation
from vllm_dsv32.kernels.triton_dependent_launch import dependence, launch_options, wait_for_launches_before
from vllm_dsv32.kernels.triton_device import ceil_div
from vllm_dsv32.layout import KV_LORA_RANK

__all__ = ["LN_2", "compilations", "join_splits", "keys_of_split", "split_count"]

LN_2 = tl.constexpr(0.6931471805599453)
"""Softmax is computed to the base 2; what is given out is natural."""
_MAX_SPLITS = 32
_START_COST = 64
"""Of a program, in keys: reading its queries, waiting for its first rows, writing its result."""
_JOIN_COST = 64
"""Of the second launch, in keys."""
_NUM_WARPS = 4
_TILE_SIZE = 4096
"""Values that a program of the second launch holds, all loaded at once."""


@lru_cache(maxsize=4096)
def split_count(num_programs: int, num_keys: int, num_concurrent: int, tile_size: int) -> int:
    """Into how many splits to divide the keys of every token, so that the launch is over soonest.

    Args:
        num_programs: without splits.
        num_keys: of a token, at most; the host knows no more.
        num_concurrent: programs that the GPU runs at once.
        tile_size: keys that a program takes at once.
    """
    most = min(_MAX_SPLITS, ceil_div(num_keys, tile_size))
    candidates = [1, *(n for n in range(2, most + 1) if n * num_programs <= 2 * num_concurrent)]

    def cost(num_splits: int) -> int:
        num_waves = ceil_div(num_programs * num_splits, num_concurrent)
        num_tiles = ceil_div(ceil_div(num_keys, num_splits), tile_size)
        return num_waves * (num_tiles * tile_size + _START_COST) + (_JOIN_COST if num_splits > 1 else 0)

    return min(candidates, key=cost)


@triton.jit
def keys_of_split(num_keys: tl.tensor, num_splits: tl.tensor, TILE_SIZE: tl.constexpr) -> tl.tensor:
    """How many keys each split takes: whole tiles, at least one, so that few keys leave splits empty."""
    return tl.maximum(tl.cdiv(tl.cdiv(num_keys, num_splits), TILE_SIZE), 1) * TILE_SIZE


@triton.jit(do_not_specialize=["num_splits"])
def _join_splits_kernel(
    part_out_ptr: tl.tensor,
    part_lse_ptr: tl.tensor,
    num_valid_ptr: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    num_splits: tl.tensor,
    NUM_HEADS: tl.constexpr,
    LATENT_DIM: tl.constexpr,
    TILE_SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    DIMS: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    wait_for_launches_before(DEPENDENT)
    result = tl.program_id(0).to(tl.int64)
    token = result // NUM_HEADS
    num_keys = tl.load(num_valid_ptr + token)
    split = tl.arange(0, SPLITS)
    # Empty splits have written nothing.
    exists = split * keys_of_split(num_keys, num_splits, TILE_SIZE) < num_keys
    part = (token * num_splits + split) * NUM_HEADS + result % NUM_HEADS
    part_lse = tl.load(part_lse_ptr + part, mask=exists, other=float("-inf"))
    highest = tl.max(part_lse, axis=0)
    # Without keys: zeros, and minus infinity.
    weight = tl.exp2(part_lse - tl.where(num_keys == 0, 0.0, highest))
    total = tl.where(num_keys == 0, 1.0, tl.sum(weight, axis=0))
    dim = tl.program_id(1) * DIMS + tl.arange(0, DIMS)
    part_out = tl.load(part_out_ptr + (part * LATENT_DIM)[:, None] + dim[None, :], mask=exists[:, None], other=0.0)
    out = tl.sum(part_out * weight[:, None], axis=0) / total
    tl.store(out_ptr + result * LATENT_DIM + dim, out.to(out_ptr.dtype.element_ty))
    if tl.program_id(1) == 0:
        tl.store(lse_ptr + result, (highest + tl.log2(total)) * LN_2)


def join_splits(
    part_out: torch.Tensor,
    part_lse: torch.Tensor,
    num_valid: torch.Tensor,
    tile_size: int,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Write the attention over all keys of each token, given that over the keys of each split.

    Args:
        part_out: float32 ``[T, splits, N, 512]``; what belongs to empty splits is not read.
        part_lse: float32 ``[T, splits, N]``, to the base 2.
        num_valid: int32 ``[T]``, the keys that were split.
        tile_size: as the keys were split.
        out: ``[T, N, 512]``.
        lse: float32 ``[T, N]``, natural.
    """
    num_tokens, num_splits, num_heads, _ = part_out.shape
    constexprs = _constexprs(num_heads, num_splits, tile_size)
    _join_splits_kernel[(num_tokens * num_heads, KV_LORA_RANK // constexprs["DIMS"])](
        part_out,
        part_lse,
        num_valid,
        out,
        lse,
        num_splits,
        **constexprs,
        num_warps=_NUM_WARPS,
        **launch_options(part_out.device),
    )


def _constexprs(num_heads: int, num_splits: int, tile_size: int) -> dict[str, int]:
    splits = triton.next_power_of_2(num_splits)
    return {
        "NUM_HEADS": num_heads,
        "LATENT_DIM": KV_LORA_RANK,
        "TILE_SIZE": tile_size,
        "SPLITS": splits,
        "DIMS": min(KV_LORA_RANK, _TILE_SIZE // splits),
    }


def compilations(capability: tuple[int, int]) -> Iterator[Compilation]:
    """The kernel for the fewest and the most splits."""
    for num_splits in (2, _MAX_SPLITS):
        yield Compilation(
            name=f"sparse_mla, joining {num_splits} splits",
            kernel=_join_splits_kernel,
            signature={
                "part_out_ptr": "*fp32",
                "part_lse_ptr": "*fp32",
                "num_valid_ptr": "*i32",
                "out_ptr": "*bf16",
                "lse_ptr": "*fp32",
                "num_splits": "i32",
            },
            constexprs=_constexprs(16, num_splits, 64) | dependence(capability),
            num_warps=_NUM_WARPS,
            num_stages=1,
        )
