"""Operation ``topk_select`` in Triton: a row is read once, and what may be selected is kept in a short list.

A sample of the row gives a threshold that a few times K logits are likely to pass. They are appended to a list in
the order of their positions. A full list is cut down, which raises the threshold, so no row is too long and no
distribution too unkind; if the sample misleads and fewer than K pass, the row is read again without a threshold.
The last cut is exact. Whatever was guessed, the result is a function of the logits alone.

A list is cut in registers by halving the range of its keys: counting needs neither a sort nor a histogram, and
ends as soon as the wanted number is above. Rows that fit the registers need no list, and rows of at most K keys
are not read.

In small batches several programs filter each row, and a second launch joins their lists.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_dsv32.kernels import triton_device
from vllm_dsv32.kernels.triton_compilation import Compilation
from vllm_dsv32.kernels.triton_topk import (
    LOWEST,
    append,
    join,
    keys_of,
    load_source,
    sample_threshold,
    shortlist,
    write_all,
    write_highest,
)

__all__ = ["Tiling", "compilations", "tiling", "topk_select"]

_MAX_TOPK = 4096
"""Places in a list are counted in 15 bits."""


@dataclass(frozen=True)
class Tiling:
    """What is tuned for a GPU; no choice changes what is selected."""

    tile: int
    """Logits that are read at once."""
    sample: int
    """Logits that the first threshold is guessed from."""
    num_programs: int
    """At most in a launch that gives each program whole rows; bounds the memory of their lists."""
    num_split_programs: int
    """At most in a launch that splits rows, likewise."""
    splits: tuple[int, ...]
    """Into how many parts a row can be split; the largest is taken that the bound allows, or none."""
    num_warps: int
    max_registers: int | None
    """A thread's, where whole rows are streamed: two programs a multiprocessor wait for memory in turns."""


def tiling(capability: tuple[int, int] | None) -> Tiling:
    """The one place to tune; a capability of None is Triton's interpreter."""
    if capability is None:
        return Tiling(64, 32, 3, 16, splits=(8, 2), num_warps=1, max_registers=None)
    return Tiling(
        tile=2048,
        sample=2048,
        num_programs=512,
        num_split_programs=512,
        splits=(64, 16, 4),
        num_warps=8,
        max_registers=128,
    )


@triton.jit
def _list(lists_ptr: tl.tensor, index: tl.tensor, CAPACITY: tl.constexpr) -> tl.tensor:
    return lists_ptr + index.to(tl.int64) * (2 * CAPACITY)


@triton.jit(do_not_specialize_on_alignment=["num_keys_ptr"])
def _filter_kernel(
    logits_ptr: tl.tensor,
    num_keys_ptr: tl.tensor,
    lists_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    logits_stride: tl.tensor,
    K: tl.constexpr,
    CAPACITY: tl.constexpr,
    TILE: tl.constexpr,
    SAMPLE: tl.constexpr,
    SPLITS: tl.constexpr,
    VECTOR: tl.constexpr,
) -> None:
    """List what passes in one part of a row. More than fit are counted, and then all of the row is read anew."""
    row_index, split = tl.program_id(0), tl.program_id(1)
    seen = tl.load(num_keys_ptr + row_index)
    if seen <= CAPACITY:
        return
    row = logits_ptr + row_index.to(tl.int64) * logits_stride
    part = row_index * SPLITS + split
    list_ptr = _list(lists_ptr, part, CAPACITY)
    count = 0
    part_size = tl.cdiv(tl.cdiv(seen, SPLITS), TILE) * TILE
    begin = split * part_size
    end = tl.minimum(begin + part_size, seen)
    if begin < end:
        threshold = sample_threshold(row, seen, K, CAPACITY, SAMPLE)
        for tile_begin in range(begin, end, TILE):
            keys = keys_of(load_source(row, tile_begin, end, TILE, VECTOR), tile_begin, end)
            append(list_ptr, count, keys, tile_begin, threshold, CAPACITY)
            count += tl.sum((keys >= threshold).to(tl.int32))
    tl.store(counts_ptr + part, count)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["num_keys_ptr"])
def _select_kernel(
    logits_ptr: tl.tensor,
    num_keys_ptr: tl.tensor,
    topk_pos_ptr: tl.tensor,
    lists_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    num_rows: tl.tensor,
    logits_stride: tl.tensor,
    topk_pos_stride: tl.tensor,
    K: tl.constexpr,
    CAPACITY: tl.constexpr,
    TILE: tl.constexpr,
    SAMPLE: tl.constexpr,
    SPLITS: tl.constexpr,
    LISTS: tl.constexpr,
    VECTOR: tl.constexpr,
) -> None:
    row_index = tl.program_id(0)
    while row_index < num_rows:
        seen = tl.load(num_keys_ptr + row_index)
        row = logits_ptr + row_index.to(tl.int64) * logits_stride
        topk_pos = topk_pos_ptr + row_index.to(tl.int64) * topk_pos_stride
        if seen <= K:
            write_all(topk_pos, seen, K)
        elif seen <= CAPACITY:
            write_highest(topk_pos, row, seen, K, CAPACITY, TILE, VECTOR)
        elif LISTS:
            list_ptr = _list(lists_ptr, tl.program_id(0), CAPACITY)
            threshold = tl.full((), LOWEST, tl.int32)
            if SPLITS:
                parts = _list(parts_ptr, row_index * SPLITS, CAPACITY)
                count = join(list_ptr, parts, counts_ptr + row_index * SPLITS, CAPACITY, TILE, SPLITS)
            else:
                count = 0
                threshold = sample_threshold(row, seen, K, CAPACITY, SAMPLE)
            while count < K:
                count = shortlist(list_ptr, row, seen, threshold, K, CAPACITY, TILE, VECTOR)
                threshold = tl.full((), LOWEST, tl.int32)
            write_highest(topk_pos, list_ptr, count, K, CAPACITY, TILE, VECTOR)
        row_index += tl.num_programs(0)


def topk_select(logits: torch.Tensor, num_keys: torch.Tensor, topk_pos: torch.Tensor) -> None:
    """See :func:`vllm_dsv32.kernels.topk_select.reference`; the same result to the bit.

    Raises:
        ValueError: K is larger than the lists are made for.
    """
    num_rows, length = logits.shape
    k = topk_pos.shape[1]
    if k > _MAX_TOPK:
        raise ValueError(f"topk_select in Triton takes a top-k of at most {_MAX_TOPK}, got {k}")
    if num_rows == 0 or k == 0:
        return
    tiles = tiling(triton_device.capability_of(logits.device))
    capacity = _capacity(k, tiles)
    lists = length > capacity
    splits, num_programs = 0, num_rows
    parts = counts = topk_pos
    if lists:
        splits = next((s for s in tiles.splits if s * num_rows <= tiles.num_split_programs), 0)
        num_programs = num_rows if splits else min(num_rows, tiles.num_programs)
        memory = torch.empty((num_programs, 2, capacity), dtype=torch.int32, device=logits.device)
    else:
        memory = topk_pos
        capacity = min(capacity, max(tiles.tile, triton.next_power_of_2(length)))
    constexprs = _constexprs(k, capacity, splits, tiles, 4 if logits.stride(0) % 4 == 0 else 1)
    if splits:
        parts = memory.new_empty((num_rows, splits, 2, capacity))
        counts = memory.new_empty((num_rows, splits))
        _filter_kernel[(num_rows, splits)](
            logits, num_keys, parts, counts, logits.stride(0), **constexprs, num_warps=tiles.num_warps
        )
    _select_kernel[(num_programs,)](
        logits,
        num_keys,
        topk_pos,
        memory,
        parts,
        counts,
        num_rows,
        logits.stride(0),
        topk_pos.stride(0),
        **constexprs,
        LISTS=lists,
        num_warps=tiles.num_warps,
        maxnreg=tiles.max_registers if lists and not splits else None,
    )


def _capacity(k: int, tiles: Tiling) -> int:
    """Of a list: room for K, for as many that may turn out not to be selected, and for a tile of keys."""
    return max(4 * triton.next_power_of_2(k), 2 * tiles.tile)


def _constexprs(k: int, capacity: int, splits: int, tiles: Tiling, vector: int) -> dict[str, object]:
    return {
        "K": k,
        "CAPACITY": capacity,
        "TILE": tiles.tile,
        "SAMPLE": tiles.sample,
        "SPLITS": splits,
        "VECTOR": vector,
    }


def compilations(capability: tuple[int, int]) -> Iterator[Compilation]:
    """Both kernels for a top-k of 2048: short rows, long rows, and long rows that are split."""
    k, tiles = 2048, tiling(capability)
    capacity = _capacity(k, tiles)
    rows: dict[str, str] = {"logits_ptr": "*fp32", "num_keys_ptr": "*i32"}
    lists: dict[str, str] = {"parts_ptr": "*i32", "counts_ptr": "*i32"}
    for name, splits in (("short rows", 0), ("long rows", 0), *((f"{s} splits", s) for s in tiles.splits)):
        constexprs = _constexprs(k, capacity, splits, tiles, vector=4)
        yield Compilation(
            name=f"topk_select {name}",
            kernel=_select_kernel,
            signature={
                **rows,
                "topk_pos_ptr": "*i32",
                "lists_ptr": "*i32",
                **lists,
                "num_rows": "i32",
                "logits_stride": "i32",
                "topk_pos_stride": "i32",
            },
            constexprs={**constexprs, "LISTS": name != "short rows"},
            num_warps=tiles.num_warps,
            num_stages=1,
        )
        if splits:
            yield Compilation(
                name=f"topk_select filter {name}",
                kernel=_filter_kernel,
                signature={**rows, "lists_ptr": "*i32", "counts_ptr": "*i32", "logits_stride": "i32"},
                constexprs=constexprs,
                num_warps=tiles.num_warps,
                num_stages=1,
            )
