"""Rotary position embedding inside Triton kernels: the pairs of a layout as two tensors of one half each.

The layouts differ only in where the two values of a pair lie in memory. Both are read and written in whole
16-byte words; the rotation between is the same for both.
"""

import triton
import triton.language as tl

__all__ = ["load_cos_sin", "load_pairs", "rotate_pairs", "store_pairs"]


@triton.jit
def load_pairs(
    rows: tl.tensor, mask: tl.tensor, HALF: tl.constexpr, INTERLEAVED: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The first and the second value of each pair, float32 ``[R, HALF]`` each.

    Args:
        rows: pointers to the first rotary value of each row, ``[R]``.
        mask: which rows exist, ``[R]``; others give zeros.
        HALF: pairs a row.
        INTERLEAVED: the layout; else NeoX halves.
    """
    if INTERLEAVED:
        dims = tl.arange(0, 2 * HALF)
        x = tl.load(rows[:, None] + dims[None, :], mask=mask[:, None], other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(x, (rows.shape[0], HALF, 2)))
    else:
        dims = tl.arange(0, HALF)
        first = tl.load(rows[:, None] + dims[None, :], mask=mask[:, None], other=0.0).to(tl.float32)
        second = tl.load(rows[:, None] + HALF + dims[None, :], mask=mask[:, None], other=0.0).to(tl.float32)
    return first, second


@triton.jit
def load_cos_sin(rows: tl.tensor, mask: tl.tensor, HALF: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Cosines and sines, float32 ``[R, HALF]`` each; ``rows`` point at the rows of the tokens' positions."""
    dims = tl.arange(0, HALF)
    cos = tl.load(rows[:, None] + dims[None, :], mask=mask[:, None], other=0.0)
    sin = tl.load(rows[:, None] + HALF + dims[None, :], mask=mask[:, None], other=0.0)
    return cos, sin


@triton.jit
def rotate_pairs(
    first: tl.tensor, second: tl.tensor, cos: tl.tensor, sin: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Each pair in its plane, turned by the angle of its position."""
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def store_pairs(
    rows: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    mask: tl.tensor,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
) -> None:
    """Write pairs where :func:`load_pairs` reads them, in the type that ``rows`` point to."""
    if INTERLEAVED:
        dims = tl.arange(0, 2 * HALF)
        x = tl.reshape(tl.join(first, second), (rows.shape[0], 2 * HALF))
        tl.store(rows[:, None] + dims[None, :], x, mask=mask[:, None])
    else:
        dims = tl.arange(0, HALF)
        tl.store(rows[:, None] + dims[None, :], first, mask=mask[:, None])
        tl.store(rows[:, None] + HALF + dims[None, :], second, mask=mask[:, None])
