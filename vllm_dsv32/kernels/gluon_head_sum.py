"""The indexer's sum over heads, of a product that lies in registers, inside Gluon kernels for SM 90.

A compiler's own reduction adds over 32 values of a row in each thread, then exchanges every sum among the four
threads that share a row of the product. Here a thread's values are one chain of fused multiplications and
additions, and each exchange halves what is left, so that in the end each thread holds another score.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = ["head_sum"]

_KEYS = gl.constexpr(64)
_PER_THREAD = gl.constexpr(16)
"""Heads of a row."""
_NAN_TOO = gl.constexpr(tl.PropagateNan.ALL)
_OF_NEXT_THREAD = gl.constexpr("shfl.sync.bfly.b32 $0, $1, 1, 31, -1;")
_OF_THREAD_AFTER = gl.constexpr("shfl.sync.bfly.b32 $0, $1, 2, 31, -1;")


@gluon.jit
def head_sum(product: gl.tensor, weight: gl.tensor, ROWS: gl.constexpr, SCORE: gl.constexpr) -> gl.tensor:
    """``sum_h weight[h] * relu(product[s, h])``; NaN passes.

    Args:
        product: float32 ``[64 keys, ROWS * 64 heads]``, as wgmma leaves it.
        weight: float32 ``[ROWS * 64]``, in the layout of the product's columns.
        ROWS: 1 or 2.
        SCORE: layout of the result, in which each thread holds one score.

    Returns:
        float32 ``[64 keys, 2]``; of one row, twice the same.
    """
    # Warp, group of four threads, thread of the group.
    GROUPS: gl.constexpr = gl.DistributedLinearLayout(
        [], [[0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 2, 0], [0, 4, 0]], [[1, 0, 0], [2, 0, 0]], [], [4, 8, 4]
    )
    product, weight = gl.broadcast(product, weight[None, :])
    low, high = gl.split(_sum(_by_thread(product, ROWS), _by_thread(weight, ROWS), _PER_THREAD))
    thread = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, GROUPS)))[None, None, :]
    is_odd = thread % 2 == 1
    if ROWS == 2:
        low_0, low_1 = gl.split(low)
        high_0, high_1 = gl.split(high)
        sum_0 = _exchanged(low_0, high_0, is_odd, _OF_NEXT_THREAD, GROUPS)
        sum_1 = _exchanged(low_1, high_1, is_odd, _OF_NEXT_THREAD, GROUPS)
        score = _exchanged(sum_0, sum_1, thread >= 2, _OF_THREAD_AFTER, GROUPS)
    else:
        low, high = gl.reshape(low, (4, 8, 4)), gl.reshape(high, (4, 8, 4))
        score = _exchanged(low, high, is_odd, _OF_NEXT_THREAD, GROUPS)
        score = score + _from_thread(score, _OF_THREAD_AFTER)
    score = gl.reshape(gl.permute(gl.reshape(score, (4, 8, 2, 2)), (0, 3, 1, 2)), (_KEYS, 2))
    return gl.convert_layout(score, SCORE, assert_trivial=True)


@gluon.jit
def _by_thread(x: gl.tensor, ROWS: gl.constexpr) -> gl.tensor:
    """Warp, group of four threads, thread of the group; row, one of two keys, one of 16 heads."""
    x = gl.permute(gl.reshape(x, (4, 2, 8, ROWS, 8, 4, 2)), (0, 2, 5, 3, 1, 4, 6))
    return gl.reshape(x, (4, 8, 4, ROWS, 2, _PER_THREAD))


@gluon.jit
def _sum(x: gl.tensor, weight: gl.tensor, NUM: gl.constexpr) -> gl.tensor:
    """Of weighted positive values over the last axis, as one chain; newer Tritons' own sum is a longer tree."""
    if NUM == 2:
        x_0, x_1 = gl.split(x)
        weight_0, weight_1 = gl.split(weight)
        return gl.fma(_relu(x_1), weight_1, _relu(x_0) * weight_0)
    else:
        x_0, x_1 = _halves(x, NUM)
        weight_0, weight_1 = _halves(weight, NUM)
        return _sum_on(x_1, weight_1, _sum(x_0, weight_0, NUM // 2), NUM // 2)


@gluon.jit
def _sum_on(x: gl.tensor, weight: gl.tensor, total: gl.tensor, NUM: gl.constexpr) -> gl.tensor:
    if NUM == 2:
        x_0, x_1 = gl.split(x)
        weight_0, weight_1 = gl.split(weight)
        return gl.fma(_relu(x_1), weight_1, gl.fma(_relu(x_0), weight_0, total))
    else:
        x_0, x_1 = _halves(x, NUM)
        weight_0, weight_1 = _halves(weight, NUM)
        return _sum_on(x_1, weight_1, _sum_on(x_0, weight_0, total, NUM // 2), NUM // 2)


@gluon.jit
def _relu(x: gl.tensor) -> gl.tensor:
    return gl.maximum(x, 0.0, propagate_nan=_NAN_TOO)


@gluon.jit
def _halves(x: gl.tensor, NUM: gl.constexpr) -> tuple[gl.tensor, gl.tensor]:
    ROWS: gl.constexpr = x.shape[3]
    return gl.split(gl.reshape(x, (4, 8, 4, ROWS, 2, NUM // 2, 2)))


@gluon.jit
def _exchanged(
    low: gl.tensor, high: gl.tensor, is_high: gl.tensor, THREAD: gl.constexpr, GROUPS: gl.constexpr
) -> gl.tensor:
    """The sum over two threads: of ``low`` in the one, of ``high`` in the other."""
    low = gl.convert_layout(low, GROUPS, assert_trivial=True)
    high = gl.convert_layout(high, GROUPS, assert_trivial=True)
    return gl.where(is_high, high, low) + _from_thread(gl.where(is_high, low, high), THREAD)


@gluon.jit
def _from_thread(x: gl.tensor, THREAD: gl.constexpr) -> gl.tensor:
    return gl.inline_asm_elementwise(THREAD, "=f,f", [x], gl.float32, is_pure=False, pack=1)
