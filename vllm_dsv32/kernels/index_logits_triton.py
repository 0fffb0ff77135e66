"""Operation ``index_logits`` in Triton: one kernel for prefill and paged decode.

A program scores a few adjacent rows, with all their heads, against every n-th tile of keys: the queries are
one operand of all its products, a tile of keys is read once for all of its rows, and the head sum is taken in
registers, so that nothing but logits is written.

e4m3 products are exact in float32. GPUs without fp8 multiplication get the operands in float16, which holds
every e4m3 value; there the four exponent bits of e4m3 lie in float16's five, 8 too low.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_dsv32.kernels import triton_device
from vllm_dsv32.kernels.triton_compilation import Compilation
from vllm_dsv32.kernels.triton_dependent_launch import dependence, launch_options, wait_for_launches_before
from vllm_dsv32.kernels.triton_device import ceil_div
from vllm_dsv32.layout import INDEX_HEAD_DIM, index_key_views

__all__ = ["Tiling", "compilations", "index_logits", "new_logits", "tiling"]

_NUM_HEADS = 64
_MAX_COLUMNS = 256
_TWO_POW_16 = tl.constexpr(2.0**16)


@dataclass(frozen=True)
class Tiling:
    """What is tuned for a GPU and a shape of batch; no choice changes what is computed."""

    num_rows: int
    """Adjacent rows of a program, which share each tile of keys."""
    num_keys: int
    """Keys of a tile."""
    num_programs: int
    """Aimed at in a launch: enough to fill the GPU and to even out rows of different length."""
    keys_in_m: bool
    """Keys are the rows of the product and heads its columns: right where both operands come from shared
    memory (SM90, SM100). Elsewhere the queries stay in registers, which takes them as the rows."""
    native_fp8: bool
    num_warps: int
    num_stages: int


def tiling(capability: tuple[int, int] | None, num_heads: int, rows_per_request: float) -> Tiling:
    """The one place to tune; a capability of None is Triton's interpreter.

    A decoding request has one row, or a few with speculation, and reads its keys from memory: small tiles,
    many in flight. In prefill thousands of rows share the keys, which come from L2: the more rows share a
    tile the less of it, up to the accumulators that fit the registers.
    """
    num_rows = 1 if rows_per_request < 2 else 2 if rows_per_request < 8 else 4
    # The heads of all rows are columns of one product: a wgmma has at most 256, and wider ones came out wrong.
    num_rows = max(1, min(num_rows, _MAX_COLUMNS // _padded(num_heads)))
    if capability is None:
        return Tiling(num_rows, 16, 3, num_rows > 1, False, 1, 1)
    native_fp8 = capability >= (8, 9)
    # Of the stages, one half is the look-up of a key's block and the other half the keys themselves.
    num_stages = 7
    if capability[0] == 9:
        if num_rows == 4:
            num_stages = 5
        # Five decoding programs fit an SM, by shared memory: for up to 128 rows 640 are one wave of 132 SMs.
        return Tiling(num_rows, 64, 640 if num_rows == 1 else 1024, True, native_fp8, 4, num_stages)
    num_rows = min(num_rows, 2)
    if capability[0] == 10:
        return Tiling(num_rows, 128, 1024, True, native_fp8, 4 * num_rows, num_stages)
    return Tiling(num_rows, 64, 1024, False, native_fp8, 4, num_stages if num_rows == 1 else 5)


@triton.jit
def _float16_from_e4m3(byte: tl.tensor) -> tl.tensor:
    """uint8 to float16, exactly, times 2^-8."""
    code = byte.to(tl.uint16)
    return (((code & 0x80) << 8) | ((code & 0x7F) << 7)).to(tl.float16, bitcast=True)


@triton.jit(
    do_not_specialize=["num_rows", "block_table_stride"],
    do_not_specialize_on_alignment=["request_ids_ptr", "num_keys_ptr"],
)
def _index_logits_kernel(
    q_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    key_ptr: tl.tensor,
    key_scale_ptr: tl.tensor,
    block_table_ptr: tl.tensor,
    request_ids_ptr: tl.tensor,
    num_keys_ptr: tl.tensor,
    logits_ptr: tl.tensor,
    num_rows: tl.tensor,
    key_page_stride: tl.tensor,
    scale_page_stride: tl.tensor,
    block_table_stride: tl.tensor,
    logits_stride: tl.tensor,
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    KEYS_IN_M: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    wait_for_launches_before(DEPENDENT)
    split, num_splits = tl.program_id(1), tl.num_programs(1)
    # Later rows see more keys: the longest work starts first.
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    row = first_row + tl.arange(0, ROWS)
    exists = row < num_rows
    num_keys = tl.load(num_keys_ptr + row, mask=exists, other=0)
    logits = logits_ptr + row.to(tl.int64) * logits_stride

    if split * KEYS >= tl.max(num_keys):
        return
    dim = tl.arange(0, HEAD_DIM)
    query = tl.arange(0, ROWS * HEADS)
    head, query_row = query % HEADS, (first_row + query // HEADS).to(tl.int64)
    query_exists = (head < NUM_HEADS) & (query_row < num_rows)
    q_bytes = tl.load(
        q_ptr + (query_row * NUM_HEADS + head)[:, None] * HEAD_DIM + dim[None, :],
        mask=query_exists[:, None],
        other=0,
    )
    weight = tl.load(weights_ptr + query_row * NUM_HEADS + head, mask=query_exists, other=0.0)
    if NATIVE_FP8:
        q = q_bytes.to(tl.float8e4nv, bitcast=True)
    else:
        q = _float16_from_e4m3(q_bytes)
        weight *= _TWO_POW_16  # of both operands
    if KEYS_IN_M:
        q = tl.trans(q)

    request_ids = tl.load(request_ids_ptr + tl.minimum(row, num_rows - 1))
    previous = -1
    for i in range(ROWS):
        # Rows of one request are adjacent: each request is served when its first row is met.
        request = tl.load(request_ids_ptr + tl.minimum(first_row + i, num_rows - 1))
        served = exists & (request_ids == request)
        seen = tl.max(tl.where(served & (request != previous), num_keys, 0))
        previous = request
        blocks = block_table_ptr + request.to(tl.int64) * block_table_stride
        for tile in tl.range(split, tl.cdiv(seen, KEYS), num_splits, num_stages=NUM_STAGES):
            pos = tile * KEYS + tl.arange(0, KEYS)
            if BLOCK_SIZE % KEYS == 0:
                block = tl.load(blocks + tile * KEYS // BLOCK_SIZE).to(tl.int64)
                offset = tile * KEYS % BLOCK_SIZE + tl.arange(0, KEYS)
            else:
                block = tl.load(blocks + pos // BLOCK_SIZE, mask=pos < seen, other=0).to(tl.int64)
                offset = pos % BLOCK_SIZE
            # Unwritten keys of the last block are read as they are; each affects its own score only.
            key = tl.load(key_ptr + (block * key_page_stride + offset * HEAD_DIM)[:, None] + dim[None, :])
            key_scale = tl.load(key_scale_ptr + block * scale_page_stride + offset)
            if not NATIVE_FP8:
                key = _float16_from_e4m3(key)
            if KEYS_IN_M:
                product = tl.dot(key, q)
                product = tl.maximum(product, 0.0, propagate_nan=tl.PropagateNan.ALL) * weight[None, :]
                score = tl.sum(tl.reshape(product, (KEYS, ROWS, HEADS)), axis=2) * key_scale[:, None]
                seen_key = served[None, :] & (pos[:, None] < num_keys[None, :])
                tl.store(logits[None, :] + pos[:, None], score, mask=seen_key)
            else:
                product = tl.dot(q, tl.trans(key))
                product = tl.maximum(product, 0.0, propagate_nan=tl.PropagateNan.ALL) * weight[:, None]
                score = tl.sum(tl.reshape(product, (ROWS, HEADS, KEYS)), axis=1) * key_scale[None, :]
                seen_key = served[:, None] & (pos[None, :] < num_keys[:, None])
                tl.store(logits[:, None] + pos[None, :], score, mask=seen_key)


def index_logits(
    q_fp8: torch.Tensor,
    weights: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    request_ids: torch.Tensor,
    num_keys: torch.Tensor,
    max_num_keys: int,
) -> torch.Tensor:
    """See :func:`vllm_dsv32.kernels.index_logits.reference`; heads and dimensions are summed in another order."""
    num_rows, num_heads, head_dim = q_fp8.shape
    logits = new_logits(num_rows, max_num_keys, q_fp8.device)
    if logits.numel() == 0:
        return logits
    capability = triton_device.capability_of(q_fp8.device)
    tiles = tiling(capability, num_heads, num_rows / block_table.shape[0])
    num_row_tiles = ceil_div(num_rows, tiles.num_rows)
    num_splits = min(ceil_div(max_num_keys, tiles.num_keys), ceil_div(tiles.num_programs, num_row_tiles))
    views = index_key_views(cache)
    _index_logits_kernel[(num_row_tiles, num_splits)](
        q_fp8.view(torch.uint8),
        weights,
        views.key_fp8 if tiles.native_fp8 else views.key_fp8.view(torch.uint8),
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
        **_constexprs(num_heads, head_dim, cache.shape[1], tiles),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **launch_options(q_fp8.device),
    )
    return logits


def new_logits(num_rows: int, max_num_keys: int, device: torch.device) -> torch.Tensor:
    """Uninitialised logits, whose rows begin at multiples of 64 bytes: the next kernel can read whole words."""
    pitch = ceil_div(max_num_keys, 16) * 16
    return torch.empty((num_rows, pitch), dtype=torch.float32, device=device)[:, :max_num_keys]


def _constexprs(num_heads: int, head_dim: int, block_size: int, tiles: Tiling) -> dict[str, object]:
    return {
        "NUM_HEADS": num_heads,
        "HEADS": _padded(num_heads),
        "HEAD_DIM": head_dim,
        "BLOCK_SIZE": block_size,
        "ROWS": tiles.num_rows,
        "KEYS": tiles.num_keys,
        "KEYS_IN_M": tiles.keys_in_m,
        "NATIVE_FP8": tiles.native_fp8,
        "NUM_STAGES": tiles.num_stages,
    }


def _padded(num_heads: int) -> int:
    return max(16, triton.next_power_of_2(num_heads))


def compilations(capability: tuple[int, int]) -> Iterator[Compilation]:
    """The kernel for DeepSeek-V3.2's index heads, in each shape of batch."""
    for batch, rows_per_request in (("decode", 1), ("speculative decode", 2), ("prefill", 1024)):
        tiles = tiling(capability, _NUM_HEADS, rows_per_request)
        yield Compilation(
            name=f"index_logits {batch}",
            kernel=_index_logits_kernel,
            signature={
                "q_ptr": "*u8",
                "weights_ptr": "*fp32",
                "key_ptr": "*fp8e4nv" if tiles.native_fp8 else "*u8",
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
            constexprs=_constexprs(_NUM_HEADS, INDEX_HEAD_DIM, 64, tiles) | dependence(capability),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
