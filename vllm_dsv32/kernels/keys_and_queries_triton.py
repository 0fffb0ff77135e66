"""Operation ``keys_and_queries`` in Triton: one launch, and in large batches cuBLAS for the absorbed queries.

While decoding each part is less work than its launch, so the parts share one: each program takes a share of one
part, and the programs of a part follow those of the one before. Absorbed queries come first, because their weights
come from memory, then keys: of the others their programs do most.
"""

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from vllm_dsv32.kernels.index_insert import IndexKeys
from vllm_dsv32.kernels.index_insert_triton import insert_index_keys
from vllm_dsv32.kernels.index_query import IndexQueries
from vllm_dsv32.kernels.index_query_triton import quantise_index_queries
from vllm_dsv32.kernels.latent_insert import Latents
from vllm_dsv32.kernels.latent_insert_triton import insert_latents
from vllm_dsv32.kernels.mla_query import MlaQueries
from vllm_dsv32.kernels.mla_query_triton import absorb_mla_queries, rotate_mla_queries
from vllm_dsv32.kernels.rope import RopeLayout
from vllm_dsv32.kernels.triton_compilation import Compilation
from vllm_dsv32.kernels.triton_dependent_launch import dependence, launch_options, wait_for_launches_before
from vllm_dsv32.kernels.triton_device import ceil_div
from vllm_dsv32.layout import KV_LORA_RANK, LATENT_DIM, is_fp8_ds_mla

__all__ = ["compilations", "keys_and_queries"]

_TILES = {
    "LATENT_TOKENS": 4,
    "INDEX_TOKENS": 4,
    "INDEX_ROWS": 16,
    "MLA_ROWS": 32,
    "ABSORB_COLUMNS": 64,
}
"""What a program takes of a part. Of queries (rows: heads, of any tokens) 2,048 values, as of latents: two 16-byte
words of bfloat16 for each of its threads. Of absorbed queries few columns, so that all of a GPU reads weights."""
_NUM_WARPS = 4


def tiling(num_tokens: int, num_heads: int, dtype: torch.dtype) -> dict[str, int]:
    """The one place to tune: what a program takes of each part, by the kernel's names.

    ``ABSORB_TOKENS`` is 0 where cuBLAS absorbs the queries: its product is worth a launch where programs would read
    weights many times, and float32 is not for tensor cores. With 16 heads 128 tokens take less time in one launch.
    """
    few = num_tokens <= 32 or (num_tokens <= 128 and num_heads <= 16)
    return {**_TILES, "ABSORB_TOKENS": 32 if few and dtype.itemsize == 2 else 0}


@triton.jit(do_not_specialize=["num_tokens", "absorbed_end", "latents_end", "index_keys_end", "index_queries_end"])
def _keys_and_queries_kernel(
    num_tokens: tl.tensor,
    absorbed_end: tl.tensor,
    latents_end: tl.tensor,
    index_keys_end: tl.tensor,
    index_queries_end: tl.tensor,
    positions_ptr: tl.tensor,
    cos_sin_ptr: tl.tensor,
    kv_c_ptr: tl.tensor,
    k_pe_ptr: tl.tensor,
    latent_norm_weight_ptr: tl.tensor,
    latent_norm_eps: tl.tensor,
    latent_slots_ptr: tl.tensor,
    latent_cache_ptr: tl.tensor,
    kv_c_stride: tl.tensor,
    k_pe_stride: tl.tensor,
    latent_page_stride: tl.tensor,
    index_k_ptr: tl.tensor,
    index_norm_weight_ptr: tl.tensor,
    index_norm_bias_ptr: tl.tensor,
    index_norm_eps: tl.tensor,
    index_slots_ptr: tl.tensor,
    index_cache_ptr: tl.tensor,
    index_k_stride: tl.tensor,
    index_page_stride: tl.tensor,
    index_q_ptr: tl.tensor,
    head_weights_ptr: tl.tensor,
    q_fp8_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    index_q_stride_token: tl.tensor,
    index_q_stride_head: tl.tensor,
    head_weights_stride: tl.tensor,
    weight_factor: tl.tensor,
    q_ptr: tl.tensor,
    w_uk_t_ptr: tl.tensor,
    mla_q_ptr: tl.tensor,
    q_stride_token: tl.tensor,
    q_stride_head: tl.tensor,
    w_uk_t_stride_head: tl.tensor,
    w_uk_t_stride_dim: tl.tensor,
    w_uk_t_stride_column: tl.tensor,
    LATENT_BLOCK_SIZE: tl.constexpr,
    FP8_DS_MLA: tl.constexpr,
    INDEX_BLOCK_SIZE: tl.constexpr,
    INDEX_INTERLEAVED: tl.constexpr,
    NUM_INDEX_HEADS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NOPE_DIM: tl.constexpr,
    LATENT_TOKENS: tl.constexpr,
    INDEX_TOKENS: tl.constexpr,
    INDEX_ROWS: tl.constexpr,
    MLA_ROWS: tl.constexpr,
    ABSORB_TOKENS: tl.constexpr,
    ABSORB_COLUMNS: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    wait_for_launches_before(DEPENDENT)
    program = tl.program_id(0)
    if program < absorbed_end:
        # Left out of what large batches run: it would take registers from the other parts.
        if ABSORB_TOKENS > 0:
            absorb_mla_queries(
                program,
                num_tokens,
                q_ptr,
                w_uk_t_ptr,
                mla_q_ptr,
                q_stride_token,
                q_stride_head,
                w_uk_t_stride_head,
                w_uk_t_stride_dim,
                w_uk_t_stride_column,
                NUM_HEADS,
                NOPE_DIM,
                ABSORB_TOKENS,
                ABSORB_COLUMNS,
            )
    elif program < latents_end:
        insert_latents(
            program - absorbed_end,
            num_tokens,
            positions_ptr,
            cos_sin_ptr,
            kv_c_ptr,
            k_pe_ptr,
            latent_norm_weight_ptr,
            latent_norm_eps,
            latent_slots_ptr,
            latent_cache_ptr,
            kv_c_stride,
            k_pe_stride,
            latent_page_stride,
            LATENT_BLOCK_SIZE,
            FP8_DS_MLA,
            LATENT_TOKENS,
        )
    elif program < index_keys_end:
        insert_index_keys(
            program - latents_end,
            num_tokens,
            positions_ptr,
            cos_sin_ptr,
            index_k_ptr,
            index_norm_weight_ptr,
            index_norm_bias_ptr,
            index_norm_eps,
            index_slots_ptr,
            index_cache_ptr,
            index_k_stride,
            index_page_stride,
            INDEX_BLOCK_SIZE,
            INDEX_INTERLEAVED,
            INDEX_TOKENS,
        )
    elif program < index_queries_end:
        quantise_index_queries(
            program - index_keys_end,
            num_tokens,
            positions_ptr,
            cos_sin_ptr,
            index_q_ptr,
            head_weights_ptr,
            q_fp8_ptr,
            weights_ptr,
            index_q_stride_token,
            index_q_stride_head,
            head_weights_stride,
            weight_factor,
            NUM_INDEX_HEADS,
            INDEX_INTERLEAVED,
            INDEX_ROWS,
        )
    else:
        rotate_mla_queries(
            program - index_queries_end,
            num_tokens,
            positions_ptr,
            cos_sin_ptr,
            q_ptr,
            mla_q_ptr,
            q_stride_token,
            q_stride_head,
            NUM_HEADS,
            NOPE_DIM,
            MLA_ROWS,
        )


def keys_and_queries(
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    index_rope_layout: RopeLayout,
    latents: Latents,
    index_keys: IndexKeys,
    index_queries: IndexQueries,
    mla_queries: MlaQueries,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`vllm_dsv32.kernels.keys_and_queries.reference`; norms and products sum in another order."""
    index_q, head_weights = index_queries
    q, w_uk_t = mla_queries
    num_tokens, num_index_heads, index_head_dim = index_q.shape
    num_heads, nope_dim, _ = w_uk_t.shape
    q_fp8 = torch.empty(index_q.shape, dtype=torch.float8_e4m3fn, device=q.device)
    weights = torch.empty((num_tokens, num_index_heads), dtype=torch.float32, device=q.device)
    mla_q = torch.empty((num_tokens, num_heads, LATENT_DIM), dtype=q.dtype, device=q.device)
    if num_tokens == 0:
        return mla_q, q_fp8, weights
    tiles = tiling(num_tokens, num_heads, q.dtype)
    num_absorbing = 0
    if tiles["ABSORB_TOKENS"] == 0:
        torch.bmm(q[..., :nope_dim].transpose(0, 1), w_uk_t, out=mla_q[..., :KV_LORA_RANK].transpose(0, 1))
    else:
        column_blocks = KV_LORA_RANK // tiles["ABSORB_COLUMNS"]
        num_absorbing = ceil_div(num_tokens, tiles["ABSORB_TOKENS"]) * num_heads * column_blocks
    *ends, num_programs = itertools.accumulate(
        (
            num_absorbing,
            ceil_div(num_tokens, tiles["LATENT_TOKENS"]),
            ceil_div(num_tokens, tiles["INDEX_TOKENS"]),
            ceil_div(num_tokens * num_index_heads, tiles["INDEX_ROWS"]),
            ceil_div(num_tokens * num_heads, tiles["MLA_ROWS"]),
        )
    )
    _keys_and_queries_kernel[(num_programs,)](
        num_tokens,
        *ends,
        positions,
        cos_sin_cache,
        *latents,
        latents.kv_c.stride(0),
        latents.k_pe.stride(0),
        latents.cache.stride(0),
        *index_keys,
        index_keys.index_k.stride(0),
        index_keys.cache.stride(0),
        index_q,
        head_weights,
        q_fp8.view(torch.uint8),
        weights,
        index_q.stride(0),
        index_q.stride(1),
        head_weights.stride(0),
        num_index_heads**-0.5 * index_head_dim**-0.5,
        q,
        w_uk_t,
        mla_q,
        q.stride(0),
        q.stride(1),
        *w_uk_t.stride(),
        LATENT_BLOCK_SIZE=latents.cache.shape[1],
        FP8_DS_MLA=is_fp8_ds_mla(latents.cache),
        INDEX_BLOCK_SIZE=index_keys.cache.shape[1],
        INDEX_INTERLEAVED=index_rope_layout is RopeLayout.INTERLEAVED,
        NUM_INDEX_HEADS=num_index_heads,
        NUM_HEADS=num_heads,
        NOPE_DIM=nope_dim,
        **tiles,
        num_warps=_NUM_WARPS,
        num_stages=1,
        enable_fp_fusion=False,
        **launch_options(q.device),
    )
    return mla_q, q_fp8, weights


def compilations(capability: tuple[int, int]) -> Iterator[Compilation]:
    """The kernel for a bfloat16 model with each cache and rotation, 16 heads: a rank's share of 128 among eight.

    For batches small and large, as :func:`tiling` tells them apart.
    """
    for fp8_ds_mla, rope_layout, num_tokens in itertools.product((False, True), RopeLayout, (64, 8192)):
        yield Compilation(
            name=f"keys_and_queries fp8={fp8_ds_mla} {rope_layout.value} {num_tokens} tokens",
            kernel=_keys_and_queries_kernel,
            signature={
                "num_tokens": "i32",
                "absorbed_end": "i32",
                "latents_end": "i32",
                "index_keys_end": "i32",
                "index_queries_end": "i32",
                "positions_ptr": "*i64",
                "cos_sin_ptr": "*fp32",
                "kv_c_ptr": "*bf16",
                "k_pe_ptr": "*bf16",
                "latent_norm_weight_ptr": "*bf16",
                "latent_norm_eps": "fp32",
                "latent_slots_ptr": "*i64",
                "latent_cache_ptr": "*u8" if fp8_ds_mla else "*bf16",
                "kv_c_stride": "i32",
                "k_pe_stride": "i32",
                "latent_page_stride": "i32",
                "index_k_ptr": "*fp32",
                "index_norm_weight_ptr": "*fp32",
                "index_norm_bias_ptr": "*fp32",
                "index_norm_eps": "fp32",
                "index_slots_ptr": "*i64",
                "index_cache_ptr": "*u8",
                "index_k_stride": "i32",
                "index_page_stride": "i32",
                "index_q_ptr": "*bf16",
                "head_weights_ptr": "*fp32",
                "q_fp8_ptr": "*u8",
                "weights_ptr": "*fp32",
                "index_q_stride_token": "i32",
                "index_q_stride_head": "i32",
                "head_weights_stride": "i32",
                "weight_factor": "fp32",
                "q_ptr": "*bf16",
                "w_uk_t_ptr": "*bf16",
                "mla_q_ptr": "*bf16",
                "q_stride_token": "i32",
                "q_stride_head": "i32",
                "w_uk_t_stride_head": "i32",
                "w_uk_t_stride_dim": "i32",
                "w_uk_t_stride_column": "constexpr",
            },
            constexprs={
                "w_uk_t_stride_column": 1,
                "LATENT_BLOCK_SIZE": 64,
                "FP8_DS_MLA": fp8_ds_mla,
                "INDEX_BLOCK_SIZE": 64,
                "INDEX_INTERLEAVED": rope_layout is RopeLayout.INTERLEAVED,
                "NUM_INDEX_HEADS": 64,
                "NUM_HEADS": 16,
                "NOPE_DIM": 128,
                **tiling(num_tokens, 16, torch.bfloat16),
                **dependence(capability),
            },
            num_warps=_NUM_WARPS,
            num_stages=1,
        )
