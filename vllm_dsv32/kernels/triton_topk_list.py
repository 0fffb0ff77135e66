"""Lists of what may be selected of a row, inside Triton kernels: the memory of operation ``topk_select``.

A *list* holds logits with their positions, in the order of positions: ``CAPACITY`` words with the bits of logits,
then as many positions (all int32). The list of a row may be in parts, each with a count of its own.
"""

import triton
import triton.language as tl

from vllm_dsv32.kernels.triton_topk import LOWEST, columns, cut, highest, keys_of, logit_of, num_before, places

__all__ = ["list_part", "load_list", "load_row", "sample_threshold", "shortlist"]

_LOWEST_FINITE = tl.constexpr(-0x7F7FFFFF)
"""The key of the lowest finite logit."""


@triton.jit
def load_row(
    row: tl.tensor, begin: tl.tensor, end: tl.tensor, SIZE: tl.constexpr, VECTOR: tl.constexpr
) -> tl.tensor:
    """The logits of a row from position ``begin`` on, as float32 ``[SIZE / 4, 4]``; -inf from ``end`` on.

    Anything, though, in what is left of the word of ``VECTOR`` logits that ``end`` lies in: a mask that ended
    inside a word would have all words read in parts. ``VECTOR`` divides ``begin`` and the length of rows in memory.
    """
    pos = begin + places(SIZE)
    return tl.load(row + pos, mask=pos < tl.cdiv(end, VECTOR) * VECTOR, other=-float("inf"))


@triton.jit
def load_list(
    list_ptr: tl.tensor,
    counts: tl.tensor,
    SIZE: tl.constexpr,
    CAPACITY: tl.constexpr,
    PARTS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Keys and positions of a list of ``PARTS`` parts, each from a multiple of four places on: ``[SIZE / 4, 4]``.

    Args:
        list_ptr: to the first part; the others follow.
        counts: pointer to the count of each part.
        SIZE: how many places are loaded.
        CAPACITY: of each part.
        PARTS: how many.
    """
    word = tl.arange(0, SIZE // 4)
    source, end = word, word * 0 + tl.load(counts)
    num_words = tl.cdiv(tl.load(counts), 4)
    for part in tl.static_range(1, PARTS):
        count = tl.load(counts + part)
        within = word >= num_words
        source = tl.where(within, word - num_words + part * (CAPACITY // 2), source)
        end = tl.where(within, num_words * 4 + count, end)
        num_words += tl.cdiv(count, 4)
    return _load_words(list_ptr, source, end, CAPACITY)


@triton.jit
def _load_words(
    list_ptr: tl.tensor, source: tl.tensor, end: tl.tensor, CAPACITY: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Keys and positions of words of a list, given their indices and at which place the list ends for each."""
    SIZE: tl.constexpr = source.shape[0] * 4
    word = tl.arange(0, SIZE // 4)
    valid = places(SIZE) < end[:, None]
    pointers = list_ptr + (source * 4)[:, None] + tl.arange(0, 4)[None, :]
    any_valid = (word * 4 < end)[:, None]
    logit = tl.load(pointers, mask=any_valid, other=0)
    pos = tl.load(pointers + CAPACITY, mask=any_valid, other=0)
    return keys_of(logit.to(tl.float32, bitcast=True), valid), pos


@triton.jit
def _append(
    list_ptr: tl.tensor,
    count: tl.tensor,
    kept: tl.tensor,
    logit: tl.tensor,
    pos: tl.tensor,
    CAPACITY: tl.constexpr,
) -> None:
    """Write the logits that are kept and their positions behind the ``count`` of a list."""
    ones = kept.to(tl.int32)
    target = list_ptr + count + num_before(ones)
    ones_0, ones_1, ones_2, ones_3 = columns(ones)
    logit_0, logit_1, logit_2, logit_3 = columns(logit.to(tl.int32, bitcast=True))
    pos_0, pos_1, pos_2, pos_3 = columns(pos)
    tl.store(target, logit_0, mask=ones_0 != 0)
    tl.store(target + CAPACITY, pos_0, mask=ones_0 != 0)
    target += ones_0
    tl.store(target, logit_1, mask=ones_1 != 0)
    tl.store(target + CAPACITY, pos_1, mask=ones_1 != 0)
    target += ones_1
    tl.store(target, logit_2, mask=ones_2 != 0)
    tl.store(target + CAPACITY, pos_2, mask=ones_2 != 0)
    target += ones_2
    tl.store(target, logit_3, mask=ones_3 != 0)
    tl.store(target + CAPACITY, pos_3, mask=ones_3 != 0)


@triton.jit
def sample_threshold(row: tl.tensor, seen: tl.tensor, K: tl.constexpr, SAMPLE: tl.constexpr) -> tl.tensor:
    """A finite logit that K of a row are all but certain to reach, and not many more.

    It is guessed from ``SAMPLE`` logits, words of four at equal distances: a word costs the memory as much as one
    logit. The expectation lies five standard deviations of a random sample above K: neighbours are alike, which
    leaves less than that, but enough.
    """
    NUM_WORDS: tl.constexpr = SAMPLE // 4
    index = tl.arange(0, NUM_WORDS)
    distance, remainder = (seen // 4) // NUM_WORDS, (seen // 4) % NUM_WORDS
    word = index * distance + index * remainder // NUM_WORDS
    logit = tl.load(row + (word * 4)[:, None] + tl.arange(0, 4)[None, :])
    weight = seen.to(tl.float32) / SAMPLE
    deviations = 2.5 * tl.sqrt(weight)
    root = deviations + tl.sqrt(deviations * deviations + K)
    rank = tl.minimum(tl.ceil(root * root / weight).to(tl.int32), SAMPLE)
    total = rank * 0 + SAMPLE
    low, _, _ = cut(keys_of(logit, True), total, total, rank, rank + rank // 16)
    return logit_of(tl.maximum(low, _LOWEST_FINITE))


@triton.jit
def list_part(
    list_ptr: tl.tensor,
    row: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    seen: tl.tensor,
    K: tl.constexpr,
    CAPACITY: tl.constexpr,
    TILE: tl.constexpr,
    SAMPLE: tl.constexpr,
    VECTOR: tl.constexpr,
) -> tl.tensor:
    """List what reaches a sampled threshold between two positions; returns how many, also if they do not fit."""
    upcoming = load_row(row, begin, end, TILE, VECTOR)
    threshold = sample_threshold(row, seen, K, SAMPLE)
    count = begin * 0
    for tile_begin in range(begin, end, TILE):
        logit = upcoming
        upcoming = load_row(row, tile_begin + TILE, end, TILE, VECTOR)
        pos = tile_begin + places(TILE)
        kept = (logit >= threshold) & (pos < end)
        num_kept = tl.sum(kept.to(tl.int32))
        if count + num_kept <= CAPACITY:
            _append(list_ptr, count, kept, logit, pos, CAPACITY)
        count += num_kept
    return count


@triton.jit
def shortlist(
    list_ptr: tl.tensor,
    row: tl.tensor,
    seen: tl.tensor,
    K: tl.constexpr,
    CAPACITY: tl.constexpr,
    TILE: tl.constexpr,
    VECTOR: tl.constexpr,
) -> tl.tensor:
    """List what may be selected of any row; returns how many, K or more.

    A full list is cut down, and what is read after that has to be above the cut.
    """
    # Room for as many keys as are cut off before the next cut, against cuts that take long to be close.
    LIMIT: tl.constexpr = (K + CAPACITY // 2) // 2
    tl.static_assert(LIMIT + TILE <= CAPACITY)  # what a tile adds after a cut
    tl.debug_barrier()  # what was in the list before has been read
    count = seen * 0
    threshold = count + LOWEST
    for begin in range(0, seen, TILE):
        logit = load_row(row, begin, seen, TILE, VECTOR)
        pos = begin + places(TILE)
        keys = keys_of(logit, pos < seen)
        num_passing = tl.sum((keys >= threshold).to(tl.int32))
        if count + num_passing > CAPACITY:
            tl.debug_barrier()  # the list has been written
            word = tl.arange(0, CAPACITY // 4)
            listed, listed_pos = _load_words(list_ptr, word, word * 0 + count, CAPACITY)
            low, num_low, num_kept = cut(listed, count, seen, K, LIMIT)
            remains = highest(listed, low, num_low, num_kept)
            tl.debug_barrier()  # what is overwritten has been read
            _append(list_ptr, 0, remains, logit_of(listed), listed_pos, CAPACITY)
            count = num_kept
            threshold = low + 1  # an equal key loses against K or more of lower positions
            num_passing = tl.sum((keys >= threshold).to(tl.int32))
        _append(list_ptr, count, keys >= threshold, logit, pos, CAPACITY)
        count += num_passing
    tl.debug_barrier()
    return count
