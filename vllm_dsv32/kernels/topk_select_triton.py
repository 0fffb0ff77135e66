"""Operation ``topk_select`` in Triton: a row is read once, and what may be selected is kept in a short list.

A sample of the row gives a threshold that a few more than K logits are all but certain to reach. They are listed
in the order of their positions, and the list, which fits the registers, is cut down to K. If the sample misleads,
and fewer than K reach the threshold or more than fit, the row is read again, and the list is cut whenever it is
full. Whatever was guessed, the result is a function of the logits alone.

One launch lists, and a second one cuts; in small batches several programs list the parts of each row. Rows that fit
the registers need no list, and rows of at most K keys are not read. What was selected is turned into slots by
the program that selected it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from vllm_dsv32.kernels import triton_device
from vllm_dsv32.kernels.triton_compilation import Compilation
from vllm_dsv32.kernels.triton_dependent_launch import dependence, launch_options, wait_for_launches_before
from vllm_dsv32.kernels.triton_topk import columns, cut, highest, keys_of, num_before, places
from vllm_dsv32.kernels.triton_topk_list import list_part, load_list, load_row, shortlist

__all__ = ["SCRATCH_NBYTES", "Tiling", "compilations", "tiling", "topk_select"]

_MAX_TOPK = 2048
"""DeepSeek's, for which lists fit the registers."""
_NUM_PROGRAMS = 1056
SCRATCH_NBYTES = _NUM_PROGRAMS * 4 * (2 * 4 * _MAX_TOPK + 1)
"""What a call takes and gives back, at most: lists, and how long they are."""
_MIN_CAPACITY = 16


@dataclass(frozen=True)
class Tiling:
    """What is tuned for a GPU; no choice changes what is selected."""

    tile: int
    """Logits that are read at once."""
    sample: int
    """Logits that the threshold is guessed from."""
    num_programs: int
    """That list, at most, in one launch; bounds the memory of their lists."""
    num_split_programs: int
    """That list, at most, where rows are split."""
    splits: tuple[int, ...]
    """Into how many parts a row can be split; the largest is taken that the bound allows, or none."""
    num_lone_rows: int
    """Up to so many rows, a program has a multiprocessor to itself."""
    num_lone_warps: int
    """Of a program that cuts and has a multiprocessor to itself; half as many where a row is half as long."""
    num_warps: int
    """Of one that has not."""
    max_registers: int | None
    """A thread's, of one that has not."""
    max_short_registers: int | None
    """The same where a row is half as long, or less."""
    num_list_warps: int
    """Of a program that lists."""
    max_list_registers: int | None
    """A thread's, of one that lists."""


def tiling(capability: tuple[int, int] | None) -> Tiling:
    """The one place to tune; a capability of None is Triton's interpreter."""
    if capability is None:
        return Tiling(
            tile=64,
            sample=32,
            num_programs=16,
            num_split_programs=16,
            splits=(8, 2),
            num_lone_rows=0,
            num_lone_warps=1,
            num_warps=1,
            max_registers=None,
            max_short_registers=None,
            num_list_warps=1,
            max_list_registers=None,
        )
    return Tiling(
        tile=2048,
        sample=2048,
        num_programs=_NUM_PROGRAMS,
        num_split_programs=528,
        splits=(16, 8, 4, 2),
        num_lone_rows=132,
        num_lone_warps=8,
        num_warps=8,
        max_registers=128 if capability < (10, 0) else 168,  # of 128, the compiler spills too many there
        max_short_registers=64,
        num_list_warps=4,
        max_list_registers=128,
    )


@triton.jit(do_not_specialize_on_alignment=["num_keys_ptr"])
def _list_kernel(
    logits_ptr: tl.tensor,
    num_keys_ptr: tl.tensor,
    lists_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    logits_stride: tl.tensor,
    K: tl.constexpr,
    CAPACITY: tl.constexpr,
    TILE: tl.constexpr,
    SAMPLE: tl.constexpr,
    PARTS: tl.constexpr,
    VECTOR: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """List what may be selected of one part of a row."""
    wait_for_launches_before(DEPENDENT)
    row_index, part = tl.program_id(0), tl.program_id(1)
    seen = tl.load(num_keys_ptr + row_index)
    if seen <= CAPACITY:
        return
    row = logits_ptr + row_index.to(tl.int64) * logits_stride
    index = row_index * PARTS + part
    part_size = tl.cdiv(tl.cdiv(seen, PARTS), 4) * 4
    begin = part * part_size
    end = tl.minimum(begin + part_size, seen)
    list_ptr = lists_ptr + index.to(tl.int64) * (2 * CAPACITY)
    count = list_part(list_ptr, row, begin, end, seen, K, CAPACITY, TILE, SAMPLE, VECTOR)
    tl.store(counts_ptr + index, count)


@triton.jit
def _slots_of(pos: tl.tensor, blocks: tl.tensor, valid: tl.tensor, BLOCK_SIZE: tl.constexpr) -> tl.tensor:
    """The slots of valid positions in a request, given the pointer to its row of the block table."""
    block = pos // BLOCK_SIZE
    return pos + (tl.load(blocks + block, mask=valid, other=0) - block) * BLOCK_SIZE


@triton.jit
def _write_all(
    topk_slot: tl.tensor, blocks: tl.tensor, seen: tl.tensor, K: tl.constexpr, BLOCK_SIZE: tl.constexpr
) -> None:
    """The result of a row that sees no more than K keys."""
    rank = tl.arange(0, triton.next_power_of_2(K))
    slot = _slots_of(rank, blocks, rank < seen, BLOCK_SIZE)
    tl.store(topk_slot + rank, tl.where(rank < seen, slot, -1), mask=rank < K)


@triton.jit
def _replace_by_slots(topk_pos: tl.tensor, blocks: tl.tensor, K: tl.constexpr, BLOCK_SIZE: tl.constexpr) -> None:
    """Replace K positions by their slots.

    Only now, side by side: of what a program held before most is not selected, and its registers were all taken.
    """
    tl.debug_barrier()  # the positions have been written
    rank = tl.arange(0, triton.next_power_of_2(K))
    pos = tl.load(topk_pos + rank, mask=rank < K, other=0)
    tl.store(topk_pos + rank, _slots_of(pos, blocks, rank < K, BLOCK_SIZE), mask=rank < K)


@triton.jit
def _write_highest(
    topk_pos: tl.tensor,
    row: tl.tensor,
    seen: tl.tensor,
    list_ptr: tl.tensor,
    counts: tl.tensor,
    count: tl.tensor,
    K: tl.constexpr,
    CAPACITY: tl.constexpr,
    SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    VECTOR: tl.constexpr,
) -> None:
    """The positions of the K highest of a row, or of the list of a row that is longer than the capacity."""
    pos = places(SIZE)
    if PARTS == 0:  # noqa: SIM114 (the others are not compiled then)
        keys = keys_of(load_row(row, 0, seen, SIZE, VECTOR), pos < seen)
    elif seen <= CAPACITY:
        keys = keys_of(load_row(row, 0, seen, SIZE, VECTOR), pos < seen)
    else:
        keys, pos = load_list(list_ptr, counts, SIZE, CAPACITY, PARTS)
    low, num_low, num_kept = cut(keys, count, seen, K, K)
    ones = highest(keys, low, num_low, num_kept).to(tl.int32)
    target = topk_pos + num_before(ones)
    ones_0, ones_1, ones_2, ones_3 = columns(ones)
    pos_0, pos_1, pos_2, pos_3 = columns(pos)
    tl.store(target, pos_0, mask=ones_0 != 0)
    target += ones_0
    tl.store(target, pos_1, mask=ones_1 != 0)
    target += ones_1
    tl.store(target, pos_2, mask=ones_2 != 0)
    target += ones_2
    tl.store(target, pos_3, mask=ones_3 != 0)


@triton.jit(
    do_not_specialize=["block_table_stride"],
    do_not_specialize_on_alignment=["num_keys_ptr", "request_ids_ptr", "block_table_ptr"],
)
def _select_kernel(
    logits_ptr: tl.tensor,
    num_keys_ptr: tl.tensor,
    request_ids_ptr: tl.tensor,
    block_table_ptr: tl.tensor,
    topk_slot_ptr: tl.tensor,
    lists_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    logits_stride: tl.tensor,
    block_table_stride: tl.tensor,
    topk_slot_stride: tl.tensor,
    K: tl.constexpr,
    CAPACITY: tl.constexpr,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """Select from a row whose parts have been listed, or that fits the capacity: then ``PARTS`` may be 0."""
    wait_for_launches_before(DEPENDENT)
    row_index = tl.program_id(0)
    seen = tl.load(num_keys_ptr + row_index)
    row = logits_ptr + row_index.to(tl.int64) * logits_stride
    blocks = block_table_ptr + tl.load(request_ids_ptr + row_index).to(tl.int64) * block_table_stride
    topk_slot = topk_slot_ptr + row_index.to(tl.int64) * topk_slot_stride
    if seen <= K:
        _write_all(topk_slot, blocks, seen, K, BLOCK_SIZE)
        return
    list_ptr = lists_ptr + row_index.to(tl.int64) * (PARTS * 2 * CAPACITY)
    counts = counts_ptr + row_index * PARTS
    count, num_places = seen, seen
    if PARTS > 0:  # noqa: SIM102 (what is nested is not compiled otherwise)
        if seen > CAPACITY:
            part = tl.arange(0, PARTS)
            part_counts = tl.load(counts + part)
            count = tl.sum(part_counts)
            num_places = tl.sum(tl.cdiv(part_counts, 4) * 4)
            if (count < K) | (num_places > CAPACITY):
                count = shortlist(list_ptr, row, seen, K, CAPACITY, TILE // 4, VECTOR)
                num_places = count
                tl.store(counts + part, tl.where(part == 0, count, 0))
                tl.debug_barrier()  # list and counts have been written
    if (CAPACITY // 2 > K) & (num_places <= CAPACITY // 2):
        _write_highest(topk_slot, row, seen, list_ptr, counts, count, K, CAPACITY, CAPACITY // 2, PARTS, VECTOR)
    else:
        _write_highest(topk_slot, row, seen, list_ptr, counts, count, K, CAPACITY, CAPACITY, PARTS, VECTOR)
    _replace_by_slots(topk_slot, blocks, K, BLOCK_SIZE)


def topk_select(
    logits: torch.Tensor,
    num_keys: torch.Tensor,
    request_ids: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
    topk_slot: torch.Tensor,
) -> None:
    """See :func:`vllm_dsv32.kernels.topk_select.reference`; the same result to the bit.

    Raises:
        ValueError: K is larger than the lists are made for.
    """
    num_rows, length = logits.shape
    k = topk_slot.shape[1]
    if k > _MAX_TOPK:
        raise ValueError(f"topk_select in Triton takes a top-k of at most {_MAX_TOPK}, got {k}")
    if num_rows == 0 or k == 0:
        return
    tiles = tiling(triton_device.capability_of(logits.device))
    capacity, vector = _capacity(k, tiles), 4 if logits.stride(0) % 4 == 0 else 1
    if length <= capacity:
        # Rows of K keys are not read: one size, then, for all that are shorter than twice that.
        capacity = min(capacity, triton.next_power_of_2(max(length, 2 * k, _MIN_CAPACITY)))
        _select_kernel[(num_rows,)](
            logits,
            num_keys,
            request_ids,
            block_table,
            topk_slot,
            topk_slot,
            topk_slot,
            logits.stride(0),
            block_table.stride(0),
            topk_slot.stride(0),
            **_select_constexprs(k, capacity, 0, tiles, vector, block_size),
            **_select_options(num_rows, capacity < _capacity(k, tiles), tiles),
            **launch_options(logits.device),
        )
        return
    rows_at_once = min(num_rows, tiles.num_programs)
    parts = next((s for s in tiles.splits if s * rows_at_once <= tiles.num_split_programs), 1)
    lists = topk_slot.new_empty((rows_at_once, parts, 2, capacity))
    counts = topk_slot.new_empty((rows_at_once, parts))
    for begin in range(0, num_rows, rows_at_once):
        rows = slice(begin, min(begin + rows_at_once, num_rows))
        _list_kernel[(rows.stop - begin, parts)](
            logits[rows],
            num_keys[rows],
            lists,
            counts,
            logits.stride(0),
            **_list_constexprs(k, capacity, parts, tiles, vector),
            num_warps=tiles.num_list_warps,
            maxnreg=tiles.max_list_registers,
            **launch_options(logits.device),
        )
        _select_kernel[(rows.stop - begin,)](
            logits[rows],
            num_keys[rows],
            request_ids[rows],
            block_table,
            topk_slot[rows],
            lists,
            counts,
            logits.stride(0),
            block_table.stride(0),
            topk_slot.stride(0),
            **_select_constexprs(k, capacity, parts, tiles, vector, block_size),
            **_select_options(rows_at_once, False, tiles),
            **launch_options(logits.device),
        )


def _capacity(k: int, tiles: Tiling) -> int:
    """Of a list: room for K, for as many that may turn out not to be selected, and for a tile of keys."""
    return max(4 * triton.next_power_of_2(k), 2 * tiles.tile)


def _select_options(num_rows: int, short: bool, tiles: Tiling) -> dict[str, Any]:
    if num_rows <= tiles.num_lone_rows:
        return {"num_warps": max(1, tiles.num_lone_warps // 2 if short else tiles.num_lone_warps), "maxnreg": None}
    return {"num_warps": tiles.num_warps, "maxnreg": tiles.max_short_registers if short else tiles.max_registers}


def _list_constexprs(k: int, capacity: int, parts: int, tiles: Tiling, vector: int) -> dict[str, object]:
    sizes = {"K": k, "CAPACITY": capacity, "TILE": tiles.tile, "PARTS": parts, "VECTOR": vector}
    return {**sizes, "SAMPLE": tiles.sample}


def _select_constexprs(
    k: int, capacity: int, parts: int, tiles: Tiling, vector: int, block_size: int
) -> dict[str, object]:
    sizes = {"K": k, "CAPACITY": capacity, "TILE": tiles.tile, "PARTS": parts, "VECTOR": vector}
    return {**sizes, "BLOCK_SIZE": block_size}


def compilations(capability: tuple[int, int]) -> Iterator[Compilation]:
    """Both kernels for a top-k of 2048: short rows, few and many, and long rows, whole and split."""
    k, tiles, dependent = 2048, tiling(capability), dependence(capability)
    capacity = _capacity(k, tiles)
    rows: dict[str, str] = {"logits_ptr": "*fp32", "num_keys_ptr": "*i32"}
    results: dict[str, str] = dict.fromkeys(("request_ids_ptr", "block_table_ptr", "topk_slot_ptr"), "*i32")
    lists: dict[str, str] = {"lists_ptr": "*i32", "counts_ptr": "*i32"}
    strides: dict[str, str] = dict.fromkeys(("logits_stride", "block_table_stride", "topk_slot_stride"), "i32")
    sizes = [(0, capacity // 2), *((parts, capacity) for parts in (0, 1, *tiles.splits))]
    for parts, size in sizes:
        name = f"{parts} parts" if parts else f"rows of {size}"
        for num_rows in (1, tiles.num_lone_rows + 1):
            if parts > 1 and parts * num_rows > tiles.num_split_programs:
                continue
            options = _select_options(num_rows, size < capacity, tiles)
            yield Compilation(
                name=f"topk_select {name}, {num_rows} rows",
                kernel=_select_kernel,
                signature={**rows, **results, **lists, **strides},
                constexprs=_select_constexprs(k, size, parts, tiles, vector=4, block_size=64) | dependent,
                num_warps=options["num_warps"],
                num_stages=1,
                max_registers=options["maxnreg"],
            )
        if parts:
            yield Compilation(
                name=f"topk_select list of {name}",
                kernel=_list_kernel,
                signature={**rows, **lists, "logits_stride": "i32"},
                constexprs=_list_constexprs(k, capacity, parts, tiles, vector=4) | dependent,
                num_warps=tiles.num_list_warps,
                num_stages=1,
                max_registers=tiles.max_list_registers,
            )
