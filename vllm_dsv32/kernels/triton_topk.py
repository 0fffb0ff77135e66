"""Cutting keys down to the K highest inside Triton kernels: the search of operation ``topk_select``.

A *key* is the int32 with the order of a logit. Keys are held as ``[SIZE / 4, 4]``, four places in a row to a
thread: a word of memory, a part of each sum and scan that needs no exchange, and four columns (:func:`columns`)
that are laid out as stores want them.
"""

import triton
import triton.language as tl

__all__ = ["LOWEST", "NOTHING", "columns", "cut", "highest", "keys_of", "logit_of", "num_before", "places"]

NOTHING = tl.constexpr(-0x80000000)
"""The key of a place without a logit: below that of minus infinity."""
LOWEST = tl.constexpr(-0x7F800000)
"""The key of minus infinity."""


@triton.jit
def places(SIZE: tl.constexpr) -> tl.tensor:
    """int32 ``[SIZE / 4, 4]``: 0, 1, 2, ..."""
    return tl.arange(0, SIZE // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]


@triton.jit
def columns(x: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The four columns of ``[N, 4]``."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def num_before(ones: tl.tensor) -> tl.tensor:
    """How many ones of ``[N, 4]`` lie in the rows above each: int32 ``[N]``."""
    in_row = tl.sum(ones, axis=1)
    return tl.cumsum(in_row, axis=0) - in_row


@triton.jit
def keys_of(logit: tl.tensor, valid: tl.tensor) -> tl.tensor:
    """float32 to the int32 of the same order: NaN as -inf, one key for both zeros; ``NOTHING`` where not valid."""
    bits = logit.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, NOTHING - bits, bits)
    return tl.where(valid, tl.where(logit == logit, key, LOWEST), NOTHING)


@triton.jit
def logit_of(key: tl.tensor) -> tl.tensor:
    """The float32 that has a key."""
    return tl.where(key < 0, NOTHING - key, key).to(tl.float32, bitcast=True)


@triton.jit
def _extent(keys: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The lowest key and the highest."""
    lowest = tl.min(tl.where(keys == NOTHING, 0x7FFFFFFF, keys), axis=1)
    # One reduction for both: ~ turns the order around. Not negatives: of max(max(-a, -b), -c), ptxas 12.8 to 13.0
    # makes max(-a, b, -c) for SM 90 and 100.
    both = tl.max(tl.join(tl.max(keys, axis=1), ~lowest), axis=0)
    highest_key, complement = tl.split(both)
    return ~complement, highest_key


@triton.jit
def _log_odds(count: tl.tensor, total: tl.tensor) -> tl.tensor:
    count = tl.minimum(tl.maximum(count * 1.0, 0.5), total - 0.5)
    return tl.log2(count) - tl.log2(total - count)


@triton.jit
def _guess(logit: tl.tensor, low: tl.tensor, high: tl.tensor) -> tl.tensor:
    """The key of a logit, which may be NaN, moved between both ends."""
    bits = logit.to(tl.int32, bitcast=True)
    return tl.minimum(tl.maximum(tl.where(bits < 0, NOTHING - bits, bits), low + 1), high - 1)


@triton.jit
def cut(
    keys: tl.tensor, count: tl.tensor, total: tl.tensor, k: tl.tensor, limit: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Where to cut so that the ``k`` highest keys remain, and not more than ``limit`` in all.

    Each round counts the keys above two guesses on both sides of where the k-th highest should lie: first as if
    logits had a logistic distribution, then as if they were even in the interval that is left. A round that leaves
    more than three quarters of the keys in the interval is followed by one that cuts the range of keys in three. So
    there are at most some 60 rounds, whatever the distribution. The guesses change nothing but the time.

    Args:
        keys: int32 ``[N, 4]``, ``NOTHING`` where there is none, less than 2^15.
        count: of the others; at least ``k``.
        total: of the keys that these are the highest of, for the first guess.
        k: how many have to remain; at least 1.
        limit: how many may remain; at least ``k``.

    Returns:
        The lowest key that remains; how many keys are above or equal to it; and of these, how many remain: fewer
        only where equal keys make them more than the limit, and then ``k``.
    """
    low, high = _extent(keys)
    high += 1
    num_low, num_high = count, count * 0
    num_total = total.to(tl.float32)
    odds_low = _log_odds(num_low, num_total)
    aim = (odds_low - _log_odds(k, num_total)) / (odds_low - _log_odds(num_high, num_total))
    margin = aim * 0 + 0.04
    stuck = False
    while (num_low > limit) & (low + 1 < high):
        bottom = logit_of(low)
        range_size = logit_of(high) - bottom
        # By halves: the range of keys itself may exceed what an int32 holds.
        third = tl.maximum(((high >> 1) - (low >> 1)) // 3 * 2, 1)
        first = tl.where(stuck, low + third, _guess(bottom + range_size * (aim - margin), low, high))
        second = tl.where(stuck, high - third, _guess(bottom + range_size * (aim + margin), low, high))
        # One sum for both counts.
        counts = tl.sum((keys >= first).to(tl.int32) + ((keys >= second).to(tl.int32) << 16))
        num_first, num_second = counts & 0xFFFF, counts >> 16
        num_between = num_low - num_high
        low = tl.where(num_second >= k, second, tl.where(num_first >= k, first, low))
        num_low = tl.where(num_second >= k, num_second, tl.where(num_first >= k, num_first, num_low))
        high = tl.where(num_first < k, first, tl.where(num_second < k, second, high))
        num_high = tl.where(num_first < k, num_first, tl.where(num_second < k, num_second, num_high))
        stuck = 4 * (num_low - num_high) > 3 * num_between
        root = tl.rsqrt((num_low - num_high).to(tl.float32))
        aim = (num_low - k + 0.5) * root * root
        margin = tl.minimum(0.03 + 0.4 * root, 0.1667)
    return low, num_low, tl.where(num_low > limit, k, num_low)


@triton.jit
def highest(keys: tl.tensor, low: tl.tensor, num_low: tl.tensor, num_kept: tl.tensor) -> tl.tensor:
    """Which keys remain after a :func:`cut`: of equal ones the first."""
    place = places(keys.shape[0] * 4)
    # At how many places from the first on keys equal to the lowest remain.
    fewest, most = num_low * 0, num_low * 0 + keys.shape[0] * 4
    if num_kept < num_low:
        num_above = tl.sum((keys > low).to(tl.int32))
        while fewest < most:
            middle = (fewest + most) // 2
            enough = num_above + tl.sum(((keys == low) & (place < middle)).to(tl.int32)) >= num_kept
            fewest = tl.where(enough, fewest, middle + 1)
            most = tl.where(enough, middle, most)
    return keys >= tl.where(place < most, low, low + 1)
