"""Selecting the K highest of a row inside Triton kernels: the pieces of operation ``topk_select``.

A *key* is the int32 with the order of a logit. A *list* holds what may be selected of a row, in the order of
positions: ``CAPACITY`` keys in memory, then their positions. What is called a source is a list (int32) or a row
of logits (float32), whose positions are its places.
"""

import triton
import triton.language as tl

__all__ = [
    "LOWEST",
    "append",
    "join",
    "keys_of",
    "load_source",
    "sample_threshold",
    "shortlist",
    "write_all",
    "write_highest",
]

_MINUS_INFINITY_BITS = tl.constexpr(-0x00800000)  # 0xff800000
_HIGHEST = tl.constexpr(0x7FFFFFFF)
_NOTHING = tl.constexpr(-0x80000000)
"""The key of a place without a logit: below that of minus infinity."""
LOWEST = tl.constexpr(-0x7FFFFFFF)
"""A threshold that every logit passes."""


@triton.jit
def _ordered(logit: tl.tensor) -> tl.tensor:
    """float32 to the int32 of the same order: NaN as -inf, and one key for both zeros."""
    bits = logit.to(tl.int32, bitcast=True)
    bits = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, _MINUS_INFINITY_BITS, bits)
    bits = tl.where(bits == _NOTHING, 0, bits)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def load_source(
    source: tl.tensor, begin: tl.tensor, count: tl.tensor, SIZE: tl.constexpr, VECTOR: tl.constexpr
) -> tl.tensor:
    """What lies at ``SIZE`` places of a source, for :func:`keys_of`.

    Args:
        source: pointer to a list or to a row.
        begin: first place, a multiple of ``VECTOR``.
        count: of the source's keys.
        SIZE: how many places.
        VECTOR: values of a word in memory, of which the source has a whole number; a mask that ends inside a
            word would have all words read in parts.
    """
    place = begin + tl.arange(0, SIZE)
    return tl.load(source + place, mask=place < tl.cdiv(count, VECTOR) * VECTOR, other=0)


@triton.jit
def keys_of(loaded: tl.tensor, begin: tl.tensor, count: tl.tensor) -> tl.tensor:
    """Keys; ``_NOTHING`` from ``count`` on."""
    if loaded.dtype == tl.float32:
        loaded = _ordered(loaded)
    return tl.where(begin + tl.arange(0, loaded.shape[0]) < count, loaded, _NOTHING)


@triton.jit
def _cut(keys: tl.tensor, count: tl.tensor, k: tl.tensor, limit: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Where to cut so that the ``k`` highest remain, and not more than ``limit`` in all.

    The interval in which the k-th highest lies is halved until what is above its lower end is few enough. If
    ties keep it from that, the interval shrinks to their key, and only ``k`` remain.

    Args:
        keys: with ``_NOTHING`` where there is none.
        count: of the others; at least ``k``.
        k: how many have to remain.
        limit: how many may remain.

    Returns:
        The lowest key that remains, and how many of that key do: the first ones.
    """
    low = tl.min(tl.where(keys == _NOTHING, _HIGHEST, keys))
    high = tl.max(keys)
    num_from_low, num_above_high = count, 0
    while (low < high) & (num_from_low > limit):
        middle = (low | high) - ((low ^ high) >> 1)  # the mean, rounded up, without overflow
        num_from_middle = tl.sum((keys >= middle).to(tl.int32))
        enough = num_from_middle >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
        num_from_low = tl.where(enough, num_from_middle, num_from_low)
        num_above_high = tl.where(enough, num_above_high, num_from_middle)
    return low, tl.where(num_from_low > limit, k - num_above_high, num_from_low)


@triton.jit
def _keep(
    source: tl.tensor,
    count: tl.tensor,
    low: tl.tensor,
    num_ties: tl.tensor,
    target: tl.tensor,
    IN_PLACE: tl.constexpr,
    CAPACITY: tl.constexpr,
    TILE: tl.constexpr,
    VECTOR: tl.constexpr,
) -> tl.tensor:
    """Write what remains of a source after a :func:`_cut`, in order; returns how many, which is less than 2^15.

    In place, a list remains a list; elsewhere, positions alone are written.
    """
    # One scan for both counts: ties are counted in the upper half of the word.
    num_before = 0
    for begin in range(0, count, TILE):
        place = begin + tl.arange(0, TILE)
        keys = keys_of(load_source(source, begin, count, TILE, VECTOR), begin, count)
        pos = place
        if source.dtype.element_ty == tl.int32:
            pos = tl.load(source + CAPACITY + place, mask=place < count, other=-1)
        above, tied = keys > low, keys == low
        ones = above.to(tl.int32) + (tied.to(tl.int32) << 16)
        before = num_before + tl.cumsum(ones, axis=0) - ones
        num_before += tl.sum(ones)
        kept = above | (tied & ((before >> 16) < num_ties))
        rank = (before & 0xFFFF) + tl.minimum(before >> 16, num_ties)
        if IN_PLACE:
            tl.debug_barrier()  # what is overwritten has been read
            tl.store(target + rank, keys, mask=kept)
            tl.store(target + CAPACITY + rank, pos, mask=kept)
        else:
            tl.store(target + rank, pos, mask=kept)
    return (num_before & 0xFFFF) + tl.minimum(num_before >> 16, num_ties)


@triton.jit
def write_all(topk_pos: tl.tensor, seen: tl.tensor, K: tl.constexpr) -> None:
    """The result of a row that sees no more than K keys."""
    rank = tl.arange(0, triton.next_power_of_2(K))
    tl.store(topk_pos + rank, tl.where(rank < seen, rank, -1), mask=rank < K)


@triton.jit
def write_highest(
    topk_pos: tl.tensor,
    source: tl.tensor,
    count: tl.tensor,
    K: tl.constexpr,
    CAPACITY: tl.constexpr,
    TILE: tl.constexpr,
    VECTOR: tl.constexpr,
) -> None:
    """The positions of the K highest keys of a source, which has at least K and at most ``CAPACITY``."""
    low, num_ties = _cut(keys_of(load_source(source, 0, count, CAPACITY, VECTOR), 0, count), count, K, K)
    _keep(source, count, low, num_ties, topk_pos, False, CAPACITY, TILE, VECTOR)


@triton.jit
def append(
    list_ptr: tl.tensor,
    count: tl.tensor,
    keys: tl.tensor,
    begin: tl.tensor,
    threshold: tl.tensor,
    CAPACITY: tl.constexpr,
) -> None:
    """Write the keys that pass, with their positions from ``begin`` on, behind the ``count`` of the list."""
    passes = keys >= threshold
    ones = passes.to(tl.int32)
    place = count + tl.cumsum(ones, axis=0) - ones
    fits = passes & (place < CAPACITY)
    tl.store(list_ptr + place, keys, mask=fits)
    tl.store(list_ptr + CAPACITY + place, begin + tl.arange(0, keys.shape[0]), mask=fits)


@triton.jit
def shortlist(
    list_ptr: tl.tensor,
    row: tl.tensor,
    seen: tl.tensor,
    threshold: tl.tensor,
    K: tl.constexpr,
    CAPACITY: tl.constexpr,
    TILE: tl.constexpr,
    VECTOR: tl.constexpr,
) -> tl.tensor:
    """List what may be selected of a row above a threshold; returns how many.

    ``K`` or more are the highest of the row; fewer mean that the threshold was too high.
    """
    # Room for as many keys as are cut off before the next cut, against cuts that take long to be close.
    LIMIT: tl.constexpr = (K + CAPACITY // 2) // 2
    tl.debug_barrier()  # the list of a row before has been read
    count = 0
    upcoming = load_source(row, 0, seen, TILE, VECTOR)
    for begin in range(0, seen, TILE):
        keys = keys_of(upcoming, begin, seen)
        upcoming = load_source(row, begin + TILE, seen, TILE, VECTOR)
        num_passing = tl.sum((keys >= threshold).to(tl.int32))
        if count + num_passing > CAPACITY:
            tl.debug_barrier()  # the list has been written
            listed = keys_of(load_source(list_ptr, 0, count, CAPACITY, VECTOR), 0, count)
            low, num_ties = _cut(listed, count, K, LIMIT)
            count = _keep(list_ptr, count, low, num_ties, list_ptr, True, CAPACITY, TILE, VECTOR)
            threshold = low + 1  # an equal key loses against K or more of lower positions
            num_passing = tl.sum((keys >= threshold).to(tl.int32))
        append(list_ptr, count, keys, begin, threshold, CAPACITY)
        count += num_passing
    tl.debug_barrier()
    return count


@triton.jit
def sample_threshold(
    row: tl.tensor, seen: tl.tensor, K: tl.constexpr, CAPACITY: tl.constexpr, SAMPLE: tl.constexpr
) -> tl.tensor:
    """A key that more than ``K`` and at most ``CAPACITY`` of a row are likely to reach.

    It is guessed from ``SAMPLE`` logits at equal distances.
    """
    pos = tl.arange(0, SAMPLE) * seen // SAMPLE
    rank = tl.cdiv((K + CAPACITY) // 2 * SAMPLE, seen)
    low, _ = _cut(_ordered(tl.load(row + pos)), SAMPLE, rank, rank + rank // 8)
    return low


@triton.jit
def join(
    list_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    CAPACITY: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
) -> tl.tensor:
    """Copy the lists of a row's parts into one, in order; returns how many, or 0 if they do not fit."""
    split = tl.arange(0, SPLITS)
    counts = tl.load(counts_ptr + split)
    total = tl.sum(counts)
    if total > CAPACITY:
        total = 0
    else:
        source = parts_ptr + split[:, None] * (2 * CAPACITY)
        target = list_ptr + (tl.cumsum(counts, axis=0) - counts)[:, None]
        LANES: tl.constexpr = TILE // SPLITS
        for begin in range(0, tl.max(counts), LANES):
            place = begin + tl.arange(0, LANES)[None, :]
            taken = place < counts[:, None]
            tl.store(target + place, tl.load(source + place, mask=taken), mask=taken)
            pos = tl.load(source + CAPACITY + place, mask=taken)
            tl.store(target + CAPACITY + place, pos, mask=taken)
        tl.debug_barrier()
    return total
