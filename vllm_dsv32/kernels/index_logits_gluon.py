"""Operation ``index_logits`` for SM 90 in Gluon: prefill and speculative decode with 64 heads.

A warpgroup scores a few adjacent rows against every n-th pair of tiles of keys, as the Triton kernel does. What
Triton cannot say: while one half of the rows is summed over the heads, the product of the other half is under way.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from vllm_dsv32.kernels import index_logits_triton, triton_device
from vllm_dsv32.kernels.gluon_head_sum import head_sum
from vllm_dsv32.kernels.gluon_rows import copy_async, wait_for_launches_before
from vllm_dsv32.kernels.triton_compilation import Compilation
from vllm_dsv32.kernels.triton_dependent_launch import dependence, launch_options
from vllm_dsv32.kernels.triton_device import ceil_div
from vllm_dsv32.layout import INDEX_HEAD_DIM, index_key_views

__all__ = ["NUM_HEADS", "Tiling", "compilations", "index_logits", "takes", "tiling"]

NUM_HEADS = 64
_NUM_KEYS = 64
_TILES_PER_STEP = 2
_NUM_WARPS = 4
_ALIGNMENT = 16
"""Of pages, in bytes: a copy's unit."""

_HEADS = gl.constexpr(NUM_HEADS)
_HEAD_DIM = gl.constexpr(INDEX_HEAD_DIM)
_KEYS = gl.constexpr(_NUM_KEYS)
_TILES = gl.constexpr(_TILES_PER_STEP)
_STAGES = gl.constexpr(3)
_NOWHERE = gl.constexpr(1 << 30)
"""A position past the end of every row."""


@dataclass(frozen=True)
class Tiling:
    """What is tuned for a shape of batch; no choice changes what is computed."""

    num_rows: int
    """Adjacent rows of a program, 2 or 4, which share each tile of keys."""
    num_splits: int
    """Programs that share the keys of their rows, if those are as many."""
    max_registers: int | None
    """Of a thread: a multiprocessor runs three programs of 2 rows at once, or two of 4."""


def tiling(num_rows: int, num_requests: int, num_multiprocessors: int) -> Tiling | None:
    """The one place to tune; None where rows are so few a request that Triton's smaller tiles are faster.

    Programs of 4 rows read keys less often, but a tile's rows of several requests are served one request after the
    other, and of 2 rows fewer belong to several.
    """
    rows_per_request = num_rows / num_requests
    if rows_per_request < 2:
        return None
    tile_rows = 4 if rows_per_request == 4 or rows_per_request >= 8 else 2
    programs_per_sm = 2 if tile_rows == 4 else 3
    num_row_tiles = ceil_div(num_rows, tile_rows)
    two_waves = 2 * programs_per_sm * num_multiprocessors
    if (num_requests == 1 or rows_per_request == tile_rows) and 4 * num_row_tiles <= two_waves:
        # All tiles have a single request: of programs that are alike, whole waves. One wave is hardly faster where
        # requests are equally long, and much slower where they are not.
        num_splits = two_waves // num_row_tiles
    else:
        num_splits = ceil_div(1024, num_row_tiles)
    return Tiling(tile_rows, num_splits, max_registers=168 if tile_rows == 2 else None)


@gluon.jit
def _start_product(
    keys: gl.shared_memory_descriptor, q: gl.shared_memory_descriptor, used: gl.tensor, never: gl.tensor
) -> gl.tensor:
    """Multiply into the registers of what has been used.

    ``never`` is false, which the compiler does not know: else it would take other registers, have three products
    at once, and spill.
    """
    return warpgroup_mma(keys, q.permute((1, 0)), used, use_acc=never, is_async=True)


@gluon.jit
def _copy_step(
    ring: gl.shared_memory_descriptor,
    scale_ring: gl.shared_memory_descriptor,
    first_slot: gl.tensor,
    key_ptr: gl.tensor,
    key_scale_ptr: gl.tensor,
    blocks: gl.tensor,
    first_pos: gl.tensor,
    seen: gl.tensor,
    key_page_stride: gl.tensor,
    scale_page_stride: gl.tensor,
    at: gl.tensor,
    scale_at: gl.tensor,
    BLOCK_SIZE: gl.constexpr,
) -> None:
    """Have the keys of a step and their scales copied; the caller commits."""
    for t in gl.static_range(_TILES):
        pos = first_pos + t * _KEYS
        # Past the end, of the last block: it is there.
        block = gl.load(blocks + gl.minimum(pos, seen - 1) // BLOCK_SIZE).to(gl.int64)
        offset = pos % BLOCK_SIZE
        copy_async(ring.index(first_slot + t), key_ptr + (block * key_page_stride + offset * _HEAD_DIM) + at)
        scale = gl.multiple_of(block * scale_page_stride + offset, 4)
        copy_async(scale_ring.index(first_slot + t), key_scale_ptr + scale + scale_at)


@gluon.jit(
    do_not_specialize=["num_rows", "block_table_stride"],
    do_not_specialize_on_alignment=["request_ids_ptr", "num_keys_ptr"],
)
def index_logits_kernel(
    q_ptr: gl.tensor,
    weights_ptr: gl.tensor,
    key_ptr: gl.tensor,
    key_scale_ptr: gl.tensor,
    block_table_ptr: gl.tensor,
    request_ids_ptr: gl.tensor,
    num_keys_ptr: gl.tensor,
    logits_ptr: gl.tensor,
    num_rows: gl.tensor,
    key_page_stride: gl.tensor,
    scale_page_stride: gl.tensor,
    block_table_stride: gl.tensor,
    logits_stride: gl.tensor,
    BLOCK_SIZE: gl.constexpr,
    ROWS: gl.constexpr,
    DEPENDENT: gl.constexpr,
) -> None:
    """A split of the keys of a few rows, in two halves."""
    wait_for_launches_before(DEPENDENT)
    HALF: gl.constexpr = ROWS // 2
    COLUMNS: gl.constexpr = HALF * _HEADS
    STEP: gl.constexpr = _TILES * _KEYS
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 32])
    COPY: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    COPY_SCALES: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    LINES: gl.constexpr = gl.NVMMASharedLayout(128, 8, 2)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 1, [0])
    # Of scores each thread holds one.
    SCORE: gl.constexpr = gl.DistributedLinearLayout(
        [], [[8, 0], [0, 1], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [_KEYS, 2]
    )
    SCALE: gl.constexpr = gl.SliceLayout(1, SCORE)
    split, num_splits = gl.program_id(1), gl.num_programs(1)
    # Later rows see more keys: the longest work starts first.
    first_row = (gl.num_programs(0) - 1 - gl.program_id(0)) * ROWS
    # One row a lane: a maximum over all lanes is known to be the same in each, and branches on it are cheap.
    lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [4], [0]))
    lane_row = first_row + lane
    lane_exists = (lane < ROWS) & (lane_row < num_rows)
    most = gl.max(gl.load(num_keys_ptr + lane_row, mask=lane_exists, other=0), axis=0)
    begin, step = split * STEP, num_splits * STEP
    if begin >= most:
        return

    scale_ring = gl.allocate_shared_memory(gl.float32, [_STAGES * _TILES, _KEYS], PLAIN)
    ring = gl.allocate_shared_memory(gl.float8e4nv, [_STAGES * _TILES, _KEYS, _HEAD_DIM], LINES)
    q_halves = gl.allocate_shared_memory(gl.float8e4nv, [2, COLUMNS, _HEAD_DIM], LINES)
    query = gl.arange(0, COLUMNS, layout=gl.SliceLayout(1, COPY))
    dim = gl.arange(0, _HEAD_DIM, layout=gl.SliceLayout(0, COPY))
    num_queries = num_rows * _HEADS
    for half in gl.static_range(2):
        first_query = (first_row + half * HALF) * _HEADS
        q = gl.load(
            q_ptr + (first_query + query).to(gl.int64)[:, None] * _HEAD_DIM + dim[None, :],
            mask=(first_query + query < num_queries)[:, None],
            other=0,
        )
        q_halves.index(half).store(q.to(gl.float8e4nv, bitcast=True))
    q_0, q_1 = q_halves.index(0), q_halves.index(1)
    column = first_row * _HEADS + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, MMA))
    weight_0 = gl.load(weights_ptr + column, mask=column < num_queries, other=0.0)
    column += COLUMNS
    weight_1 = gl.load(weights_ptr + column, mask=column < num_queries, other=0.0)

    key = gl.arange(0, _KEYS, layout=SCALE)[:, None]
    row_of_half = gl.arange(0, 2, layout=gl.SliceLayout(0, SCORE))[None, :]
    row_0 = first_row + row_of_half
    row_1 = row_0 + HALF
    exists_0 = (row_of_half < HALF) & (row_0 < num_rows)
    exists_1 = (row_of_half < HALF) & (row_1 < num_rows)
    logits_0 = logits_ptr + row_0.to(gl.int64) * logits_stride + key
    logits_1 = logits_0 + HALF * logits_stride
    at = (gl.arange(0, _KEYS, layout=gl.SliceLayout(1, COPY)) * _HEAD_DIM)[:, None] + dim[None, :]
    scale_at = gl.arange(0, _KEYS, layout=COPY_SCALES)

    never = num_rows < 0
    used_0 = gl.zeros([_KEYS, COLUMNS], gl.float32, MMA)
    used_1 = gl.zeros([_KEYS, COLUMNS], gl.float32, MMA)
    previous = -1
    for i in range(ROWS):
        # Rows of one request are adjacent: each request is served when its first row is met.
        request = gl.load(request_ids_ptr + gl.minimum(first_row + i, num_rows - 1))
        is_served = gl.load(request_ids_ptr + lane_row, mask=lane_exists, other=-1) == request
        seen = gl.max(gl.load(num_keys_ptr + lane_row, mask=is_served, other=0), axis=0)
        seen = gl.where(request == previous, 0, seen)
        # Where in its row a thread's key is no longer seen.
        is_served_0 = gl.load(request_ids_ptr + row_0, mask=exists_0, other=-1) == request
        is_served_1 = gl.load(request_ids_ptr + row_1, mask=exists_1, other=-1) == request
        end_0 = gl.load(num_keys_ptr + row_0, mask=is_served_0, other=0) - key
        end_1 = gl.load(num_keys_ptr + row_1, mask=is_served_1, other=0) - key
        previous = request
        if begin < seen:
            blocks = block_table_ptr + request.to(gl.int64) * block_table_stride
            for s in gl.static_range(_STAGES - 1):
                if begin + s * step < seen:
                    _copy_step(
                        ring,
                        scale_ring,
                        s * _TILES,
                        key_ptr,
                        key_scale_ptr,
                        blocks,
                        begin + s * step,
                        seen,
                        key_page_stride,
                        scale_page_stride,
                        at,
                        scale_at,
                        BLOCK_SIZE,
                    )
                async_copy.commit_group()
            score_1 = gl.zeros([_KEYS, 2], gl.float32, SCORE)
            before = _NOWHERE
            stage = 0
            for start in range(begin, seen, step):
                # This stage has arrived, and all warps have done with the one before.
                async_copy.wait_group(_STAGES - 2)
                fence_async_shared()
                slot = stage * _TILES
                product_0 = _start_product(ring.index(slot), q_0, used_0, never)
                product_1 = _start_product(ring.index(slot), q_1, used_1, never)
                # The last of the step before; behind the fence, which waits for stores.
                gl.store(logits_1 + before, score_1, mask=before < end_1)
                for t in gl.static_range(_TILES):
                    pos = start + t * _KEYS
                    scale = scale_ring.index(slot + t).load(SCALE)[:, None]
                    used_0 = warpgroup_mma_wait(1, deps=[product_0])
                    score_0 = head_sum(used_0, weight_0, HALF, SCORE) * scale
                    gl.store(logits_0 + pos, score_0, mask=pos < end_0)
                    if t + 1 < _TILES:
                        product_0 = _start_product(ring.index(slot + t + 1), q_0, used_0, never)
                        used_1 = warpgroup_mma_wait(1, deps=[product_1])
                    else:
                        # Also a branch, across which ptxas moves nothing: without one it would wait first, and
                        # take both sums then.
                        ahead = start + (_STAGES - 1) * step
                        if ahead < seen:
                            _copy_step(
                                ring,
                                scale_ring,
                                gl.where(stage == 0, _STAGES - 1, stage - 1) * _TILES,
                                key_ptr,
                                key_scale_ptr,
                                blocks,
                                ahead,
                                seen,
                                key_page_stride,
                                scale_page_stride,
                                at,
                                scale_at,
                                BLOCK_SIZE,
                            )
                        async_copy.commit_group()
                        used_1 = warpgroup_mma_wait(0, deps=[product_1])
                    score_1 = head_sum(used_1, weight_1, HALF, SCORE) * scale
                    if t + 1 < _TILES:
                        product_1 = _start_product(ring.index(slot + t + 1), q_1, used_1, never)
                        gl.store(logits_1 + pos, score_1, mask=pos < end_1)
                before = start + (_TILES - 1) * _KEYS
                stage = gl.where(stage == _STAGES - 1, 0, stage + 1)
            gl.store(logits_1 + before, score_1, mask=before < end_1)
            async_copy.wait_group(0)


def index_logits(
    q_fp8: torch.Tensor,
    weights: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    request_ids: torch.Tensor,
    num_keys: torch.Tensor,
    max_num_keys: int,
) -> torch.Tensor:
    """See :func:`vllm_dsv32.kernels.index_logits.reference`; heads and dimensions are summed in another order.

    The Triton kernel scores what this one does not take: batches with less than two rows a request, where it is
    faster, blocks that are not a multiple of 64 tokens, and pages that do not begin at multiples of 16 bytes.

    Raises:
        ValueError: queries have other than 64 heads.
    """
    num_rows, num_heads, _ = q_fp8.shape
    if num_heads != NUM_HEADS:
        raise ValueError(f"index_logits in Gluon takes {NUM_HEADS} heads, got {num_heads}; choose triton")
    tiles = None
    if num_rows > 0 and takes(cache):
        num_multiprocessors = triton_device.num_multiprocessors(q_fp8.device)
        tiles = tiling(num_rows, block_table.shape[0], num_multiprocessors)
    if tiles is None:
        return index_logits_triton.index_logits(
            q_fp8, weights, cache, block_table, request_ids, num_keys, max_num_keys
        )
    logits = index_logits_triton.new_logits(num_rows, max_num_keys, q_fp8.device)
    if logits.numel() == 0:
        return logits
    num_splits = min(ceil_div(max_num_keys, _NUM_KEYS * _TILES_PER_STEP), tiles.num_splits)
    views = index_key_views(cache)
    index_logits_kernel[(ceil_div(num_rows, tiles.num_rows), num_splits)](
        q_fp8.view(torch.uint8),
        weights,
        views.key_fp8,
        views.key_scale,
        block_table,
        request_ids,
        num_keys,
        logits,
        num_rows,
        views.key_fp8.stride(0),
        views.key_scale.stride(0),
        block_table.stride(0),
        logits.stride(0),
        BLOCK_SIZE=cache.shape[1],
        ROWS=tiles.num_rows,
        num_warps=_NUM_WARPS,
        maxnreg=tiles.max_registers,
        **launch_options(q_fp8.device),
    )
    return logits


def takes(cache: torch.Tensor) -> bool:
    """Whether tiles of keys lie in one block each, where they can be copied."""
    return cache.shape[1] % _NUM_KEYS == 0 and cache.data_ptr() % _ALIGNMENT == cache.stride(0) % _ALIGNMENT == 0


def compilations(capability: tuple[int, int]) -> Iterator[Compilation]:
    """Both tilings; none but for SM 90."""
    if capability != (9, 0):
        return
    for num_rows in (2, 8192):
        tiles = tiling(num_rows, 1, num_multiprocessors=132)
        assert tiles is not None
        yield Compilation(
            name=f"index_logits in Gluon, {tiles.num_rows} rows",
            kernel=index_logits_kernel,
            signature={
                "q_ptr": "*u8",
                "weights_ptr": "*fp32",
                "key_ptr": "*fp8e4nv",
                "key_scale_ptr": "*fp32",
                "block_table_ptr": "*i32",
                "request_ids_ptr": "*i32",
                "num_keys_ptr": "*i32",
                "logits_ptr": "*fp32",
                "num_rows": "i32",
                "key_page_stride": "i32",
                "scale_page_stride": "i32",
                "block_table_stride": "i32",
                "logits_stride": "i32",
            },
            constexprs={"BLOCK_SIZE": _NUM_KEYS, "ROWS": tiles.num_rows} | dependence(capability),
            num_warps=_NUM_WARPS,
            num_stages=1,
            max_registers=tiles.max_registers,
        )
