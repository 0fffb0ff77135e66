"""Rows of an ``fp8_ds_mla`` cache as operands of matrix products, inside Triton kernels.

Four e4m3 bytes at a time become four bfloat16 in seven integer operations, on every GPU: sign and magnitude
are moved to where bfloat16 has them, which gives the value times 2^-120, exactly, and the products are scaled
back. Subnormal codes stay subnormal; tensor cores multiply those exactly (Fasi et al., 2021,
doi:10.7717/peerj-cs.330). Codes of NaN give 480: rows that were quantised from NaN are NaN by their scale.

Values come out in the order in which they need not be moved again. An operand that is summed over may have any
order that its partner shares, and one that is not is put in order once, in the result.
"""

import triton
import triton.language as tl

__all__ = [
    "GROUP",
    "TWO_POW_60",
    "WORDS",
    "in_order",
    "key_of_row",
    "like_scoring_rows",
    "scoring_rows",
    "value_rows",
]

GROUP = tl.constexpr(128)
"""Values that share a scale."""

TWO_POW_60 = tl.constexpr(2.0**60)
"""Half of the 2^120 that decoded values lack, on either side of a product: neither leaves the range of float32."""

WORDS = tl.constexpr(16)
"""int32 that are loaded at a time from a row: 64 bytes by four lanes, so that a warp loads from eight rows."""


@triton.jit
def key_of_row(row: tl.tensor, KEYS: tl.constexpr, NUM_WARPS: tl.constexpr) -> tl.tensor:
    """The key of a tile to be loaded as this row, for keys to be in order in both operands below."""
    PASSES: tl.constexpr = KEYS // (8 * NUM_WARPS)
    return row // 8 % NUM_WARPS * (8 * PASSES) + row // (8 * NUM_WARPS) * 8 + row % 8


@triton.jit
def scoring_rows(
    group_ptr: tl.tensor, KEYS: tl.constexpr, NUM_WARPS: tl.constexpr, ADJACENT: tl.constexpr
) -> tl.tensor:
    """bfloat16 ``[KEYS, 128]`` times 2^-120, the first operand of a product over columns.

    Tensor cores take it from registers, 16 rows to a warp, each lane so many adjacent columns of two rows. With
    keys and columns counted as here, a lane has loaded just what it must supply, and nothing passes through
    shared memory.

    Args:
        group_ptr: int32 ``[KEYS, 16]``, the first 64 bytes of a group in each row.
        KEYS: a multiple of eight for each warp.
        NUM_WARPS: of the kernel.
        ADJACENT: columns, 2 or 4, as Triton lays the operand out on this GPU. Wrong ones cost time only.
    """
    x = _load(group_ptr, KEYS, NUM_WARPS, "evict_last")
    x = tl.permute(x, (1, 0, 2, 5, 4, 6, 3, 7) if ADJACENT == 2 else (1, 0, 2, 5, 4, 3, 6, 7))
    return tl.reshape(x, (KEYS, GROUP))


@triton.jit
def like_scoring_rows(x: tl.tensor, ROWS: tl.constexpr, ADJACENT: tl.constexpr) -> tl.tensor:
    """``[ROWS, 128]`` with its columns in the order of :func:`scoring_rows`."""
    x = tl.reshape(x, (ROWS, 2, 4, 4, 2, 2))
    x = tl.permute(x, (0, 1, 3, 5, 2, 4) if ADJACENT == 2 else (0, 1, 3, 2, 5, 4))
    return tl.reshape(x, (ROWS, GROUP))


@triton.jit
def value_rows(group_ptr: tl.tensor, KEYS: tl.constexpr, NUM_WARPS: tl.constexpr) -> tl.tensor:
    """As :func:`scoring_rows`, with the columns in another order, which :func:`in_order` undoes.

    The values pass through shared memory, written 16 bytes at a time as loaded and decoded.
    """
    x = tl.permute(_load(group_ptr, KEYS, NUM_WARPS, "evict_first"), (1, 0, 2, 5, 3, 4, 6, 7))
    return tl.reshape(x, (KEYS, GROUP))


@triton.jit
def in_order(x: tl.tensor, COLUMNS: tl.constexpr) -> tl.tensor:
    """``[128, COLUMNS]`` whose rows are in the order of the columns of :func:`value_rows`, put in order."""
    x = tl.reshape(x, (GROUP // 4, 2, 2, COLUMNS))
    return tl.reshape(tl.permute(x, (0, 2, 1, 3)), (GROUP, COLUMNS))


@triton.jit
def _load(group_ptr: tl.tensor, KEYS: tl.constexpr, NUM_WARPS: tl.constexpr, EVICTION: tl.constexpr) -> tl.tensor:
    """Dimensions: pass, warp, row; lane, word; half of the group; parity and half of the byte within its word."""
    first = tl.load(group_ptr, eviction_policy=EVICTION)
    words = tl.join(first, tl.load(group_ptr + WORDS, eviction_policy=EVICTION))
    even = ((words << 8) & -0x7FFF8000) | ((words << 4) & 0x07F007F0)
    odd = (words & -0x7FFF8000) | ((words >> 4) & 0x07F007F0)
    low = tl.join(even.to(tl.int16), odd.to(tl.int16))
    high = tl.join((even >> 16).to(tl.int16), (odd >> 16).to(tl.int16))
    x = tl.join(low, high).to(tl.bfloat16, bitcast=True)
    return tl.reshape(x, (KEYS // (8 * NUM_WARPS), NUM_WARPS, 8, 4, 4, 2, 2, 2))
