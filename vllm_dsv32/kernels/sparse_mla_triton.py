"""Operation ``sparse_mla`` in Triton: one kernel for prefill and decode.

A program attends some heads of one token to its slots, in tiles, with an online softmax. Keys are the rows of
all products and heads their columns (S^T = K Q^T, O^T = V^T P^T): tensor cores take 64 rows or more but as few
as 8 columns, so that 8 or 16 heads cost what they are. Keys are loaded by slot and without masks: where a tile
is not full, the last key is read again, with weight zero, so that nothing but valid rows is ever read.

fp8: cached values are multiplied as they are. Their scales, one for 128 values, go to the float32 scores group
by group, and to the weights of each group before those are rounded to bfloat16, which weights are in any case.
Scaled values would have to be rounded to bfloat16, an error that every score would see. Rows are loaded for the
scores and again for the output, from L1 then: held in between, they would not fit into registers.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from vllm_dsv32.kernels import triton_device
from vllm_dsv32.kernels.sparse_mla_join_triton import LN_2, keys_of_split
from vllm_dsv32.kernels.sparse_mla_launch import Launch, launch, row_views
from vllm_dsv32.kernels.sparse_mla_tiling import Tiling, tiling
from vllm_dsv32.kernels.triton_compilation import Compilation
from vllm_dsv32.kernels.triton_dependent_launch import dependence, wait_for_launches_before
from vllm_dsv32.kernels.triton_latent import (
    GROUP,
    TWO_POW_60,
    WORDS,
    in_order,
    key_of_row,
    like_scoring_rows,
    scoring_rows,
    value_rows,
)
from vllm_dsv32.layout import LATENT_DIM, LATENT_FP8_NBYTES, ROPE_DIM, is_fp8_ds_mla

__all__ = ["compilations", "sparse_mla"]

_ROPE = tl.constexpr(ROPE_DIM)


@triton.jit
def _chunk_of(
    slots: tl.tensor,
    key: tl.tensor,
    end: tl.tensor,
    page_chunks: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    ROW_CHUNKS: tl.constexpr,
) -> tl.tensor:
    slot = tl.load(slots + tl.minimum(key, end - 1))
    return (slot // BLOCK_SIZE).to(tl.int64) * page_chunks + slot % BLOCK_SIZE * ROW_CHUNKS


@triton.jit(do_not_specialize=["num_splits", "num_slots"])
def _sparse_mla_kernel(
    q_ptr: tl.tensor,
    nope_ptr: tl.tensor,
    nope_scale_ptr: tl.tensor,
    rope_ptr: tl.tensor,
    topk_slot_ptr: tl.tensor,
    num_valid_ptr: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    scale_log2: tl.tensor,
    num_splits: tl.tensor,
    num_slots: tl.tensor,
    page_chunks: tl.tensor,
    NUM_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROW_CHUNKS: tl.constexpr,
    FP8: tl.constexpr,
    SPLIT: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    NUM_WARPS: tl.constexpr,
    ADJACENT: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    wait_for_launches_before(DEPENDENT)
    # Heads fastest: programs that read the same rows run together.
    HEAD_TILES: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    part = tl.program_id(0) // HEAD_TILES
    token = (part // num_splits).to(tl.int64)
    num_keys = tl.load(num_valid_ptr + token)
    split_size = keys_of_split(num_keys, num_splits, KEYS)
    begin = part % num_splits * split_size
    end = tl.minimum(begin + split_size, num_keys)
    if SPLIT and begin >= end:
        return

    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    # Addresses count 16-byte chunks, so that the compiler knows how they are aligned.
    PER_CHUNK: tl.constexpr = 128 // nope_ptr.dtype.element_ty.primitive_bitwidth
    ROPE_PER_CHUNK: tl.constexpr = 128 // rope_ptr.dtype.element_ty.primitive_bitwidth
    head = tl.program_id(0) % HEAD_TILES * HEADS + tl.arange(0, HEADS)
    head_exists = (head < NUM_HEADS)[:, None]
    dim = tl.arange(0, GROUP)
    rope_dim = tl.arange(0, _ROPE)
    q_rows = q_ptr + (token * NUM_HEADS + head)[:, None] * (4 * GROUP + _ROPE)
    q = [tl.load(q_rows + (dim + g * GROUP)[None, :], mask=head_exists, other=0.0) for g in (0, 1, 2, 3)]
    q_rope = tl.trans(tl.load(q_rows + (rope_dim + 4 * GROUP)[None, :], mask=head_exists, other=0.0))
    if FP8:
        q = [like_scoring_rows((x.to(tl.float32) * TWO_POW_60).to(DTYPE), HEADS, ADJACENT) for x in q]
    q = [tl.trans(x) for x in q]

    row = tl.arange(0, KEYS)
    slots = topk_slot_ptr + token * num_slots
    highest = tl.full((HEADS,), float("-inf"), tl.float32)
    denominator = tl.zeros((KEYS, HEADS), tl.float32)
    acc = [tl.zeros((GROUP, HEADS), tl.float32) for g in (0, 1, 2, 3)]
    for start in range(begin, end, KEYS):
        chunk = _chunk_of(slots, start + row, end, page_chunks, BLOCK_SIZE, ROW_CHUNKS)
        rope = tl.load(rope_ptr + (chunk * ROPE_PER_CHUNK)[:, None] + rope_dim[None, :])
        scores = tl.dot(rope.to(DTYPE), q_rope, input_precision="ieee")
        if FP8:
            scale = [tl.load(nope_scale_ptr + chunk * PER_CHUNK + g)[:, None] * TWO_POW_60 for g in (0, 1, 2, 3)]
            chunk = _chunk_of(
                slots, start + key_of_row(row, KEYS, NUM_WARPS), end, page_chunks, BLOCK_SIZE, ROW_CHUNKS
            )
            nope = nope_ptr + (chunk * PER_CHUNK)[:, None] + tl.arange(0, WORDS)[None, :]
            for g in tl.static_range(4):
                key = scoring_rows(nope + g * (2 * WORDS), KEYS, NUM_WARPS, ADJACENT).to(DTYPE)
                scores += tl.dot(key, q[g], input_precision="ieee") * scale[g]
        else:
            nope = nope_ptr + (chunk * PER_CHUNK)[:, None] + dim[None, :]
            key = [tl.load(nope + g * GROUP).to(DTYPE) for g in (0, 1, 2, 3)]
            for g in tl.static_range(4):
                scores = tl.dot(key[g], q[g], scores, input_precision="ieee")
        scores = tl.where((start + row < end)[:, None], scores * scale_log2, float("-inf"))

        previous = highest
        highest = tl.maximum(previous, tl.max(scores, axis=0))
        shrink = tl.exp2(previous - highest)[None, :]
        weight = tl.exp2(scores - highest[None, :])
        denominator = denominator * shrink + weight
        acc = [acc[g] * shrink for g in (0, 1, 2, 3)]
        if FP8:
            acc = [
                tl.dot(
                    tl.trans(value_rows(nope + g * (2 * WORDS), KEYS, NUM_WARPS).to(DTYPE)),
                    (weight * scale[g]).to(DTYPE),
                    acc[g],
                    input_precision="ieee",
                )
                for g in (0, 1, 2, 3)
            ]
        else:
            weight = weight.to(DTYPE)
            acc = [tl.dot(tl.trans(key[g]), weight, acc[g], input_precision="ieee") for g in (0, 1, 2, 3)]

    total = tl.sum(denominator, axis=0)
    # Without keys: zeros, and minus infinity.
    total = tl.where(total == 0.0, 1.0, total)
    normaliser = (1.0 / total)[None, :]
    result = part.to(tl.int64) * NUM_HEADS + head
    out = out_ptr + (result * (4 * GROUP))[None, :] + dim[:, None]
    for g in tl.static_range(4):
        value = acc[g] * normaliser
        if FP8:
            value = in_order(value * TWO_POW_60, HEADS)
        tl.store(out + g * GROUP, value.to(out_ptr.dtype.element_ty), mask=(head < NUM_HEADS)[None, :])
    lse = highest + tl.log2(total)
    tl.store(lse_ptr + result, lse if SPLIT else lse * LN_2, mask=head < NUM_HEADS)


def sparse_mla(
    q: torch.Tensor,
    cache: torch.Tensor,
    topk_slot: torch.Tensor,
    num_valid: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`vllm_dsv32.kernels.sparse_mla.reference`; weights are rounded to the dtype of ``q``."""
    num_tokens, num_heads, _ = q.shape
    fp8 = is_fp8_ds_mla(cache)
    tiles = tiling(triton_device.capability_of(q.device), num_heads, fp8, q.dtype, num_tokens)
    row_nbytes = cache.shape[2] * cache.itemsize
    how = Launch(
        kernel=_sparse_mla_kernel,
        num_heads=tiles.num_heads,
        num_keys=tiles.num_keys,
        programs_per_sm=tiles.programs_per_sm,
        constexprs=lambda split: _constexprs(num_heads, cache.shape[1], row_nbytes, fp8, split, tiles),
        options={"num_warps": tiles.num_warps, "num_stages": tiles.num_stages, "maxnreg": tiles.max_registers},
    )
    return launch(how, q, cache, row_views(cache), topk_slot, num_valid, scale)


def _constexprs(
    num_heads: int, block_size: int, row_nbytes: int, fp8: bool, split: bool, tiles: Tiling
) -> dict[str, object]:
    return {
        "NUM_HEADS": num_heads,
        "BLOCK_SIZE": block_size,
        "ROW_CHUNKS": row_nbytes // 16,
        "FP8": fp8,
        "SPLIT": split,
        "HEADS": tiles.num_heads,
        "KEYS": tiles.num_keys,
        "NUM_WARPS": tiles.num_warps,
        "ADJACENT": tiles.num_adjacent,
    }


def compilations(capability: tuple[int, int]) -> Iterator[Compilation]:
    """The kernel for DeepSeek-V3.2's 128 heads on one, eight or sixteen GPUs, and for a model in float32."""
    for num_heads, dtype, split in (
        (8, torch.bfloat16, True),
        (16, torch.bfloat16, True),
        (16, torch.bfloat16, False),
        (128, torch.bfloat16, True),
        (16, torch.float32, True),
    ):
        for fp8 in (False, True):
            tiles = tiling(capability, num_heads, fp8, dtype, num_tokens=1 if split else 4096)
            values = "*bf16" if dtype == torch.bfloat16 else "*fp32"
            row_nbytes = LATENT_FP8_NBYTES if fp8 else LATENT_DIM * dtype.itemsize
            yield Compilation(
                name=f"sparse_mla, {num_heads} heads, {dtype}, {fp8=}, {split=}",
                kernel=_sparse_mla_kernel,
                signature={
                    "q_ptr": values,
                    "nope_ptr": "*i32" if fp8 else values,
                    "nope_scale_ptr": "*fp32" if fp8 else values,
                    "rope_ptr": "*bf16" if fp8 else values,
                    "topk_slot_ptr": "*i32",
                    "num_valid_ptr": "*i32",
                    "out_ptr": "*fp32" if split else values,
                    "lse_ptr": "*fp32",
                    "scale_log2": "fp32",
                    "num_splits": "i32",
                    "num_slots": "i32",
                    "page_chunks": "i32",
                },
                constexprs=_constexprs(num_heads, 64, row_nbytes, fp8, split, tiles) | dependence(capability),
                num_warps=tiles.num_warps,
                num_stages=tiles.num_stages,
                max_registers=tiles.max_registers,
            )
