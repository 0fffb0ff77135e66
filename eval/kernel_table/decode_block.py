"""The attention of one decode step between its projections: what a layer does with what they gave.

Norms, rotation and quantisation, both caches written, scores, selection, attention over what was selected. The
products around it (queries, keys, values, output) are the same on both sides, but for the absorbed one, which is
part of it. vLLM's side is that of ``vllm/models/deepseek_v32/attention.py``, with FA3, its default, over a bfloat16
cache, and with FlashMLA over an fp8 one: the same kernels in the same order, on one stream.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from kernel_table import peers
from kernel_table.problems import (
    BLOCK_SIZE,
    INDEX_DIM,
    LATENT_DIM,
    NUM_INDEX_HEADS,
    TOPK,
    IndexProblem,
    index_problem,
)
from vllm_dsv32.kernels.dispatch import KernelSet
from vllm_dsv32.kernels.index_insert import IndexKeys
from vllm_dsv32.kernels.index_query import IndexQueries
from vllm_dsv32.kernels.latent_insert import Latents
from vllm_dsv32.kernels.mla_query import MlaQueries
from vllm_dsv32.kernels.rope import RopeLayout
from vllm_dsv32.kernels.selection import select
from vllm_dsv32.layout import KV_LORA_RANK, LATENT_GROUP_SIZE, ROPE_DIM, is_fp8_ds_mla, latent_fp8_views

__all__ = ["Attended", "BlockProblem", "in_tree", "latents_at", "ours", "prepare"]

NOPE_DIM = 128
Q_LORA_RANK = 1536
EPS = 1e-6


class Attended(NamedTuple):
    """What a block gives."""

    out: torch.Tensor
    """``[T, N, 512]``."""
    slots: torch.Tensor
    """int32 ``[T, 2048]``: of what was attended to."""


Block = Callable[[], Attended]


@dataclass(frozen=True)
class BlockProblem:
    """One token of each request, behind its projections, and its pages; bfloat16 unless said otherwise."""

    index: IndexProblem
    """Pages and lengths; its queries and weights are not used."""
    positions: torch.Tensor
    """int64 ``[T]``."""
    cos_sin: torch.Tensor
    """float32 ``[length, 64]``."""
    slots: torch.Tensor
    """int64 ``[T]``, of the tokens themselves, in both caches."""
    q_c: torch.Tensor
    """``[T, 1536]``, before its norm."""
    kv_c: torch.Tensor
    """``[T, 512]``."""
    k_pe: torch.Tensor
    """``[T, 64]``."""
    q: torch.Tensor
    """``[T, N, 192]``."""
    w_uk_t: torch.Tensor
    """``[N, 128, 512]``."""
    index_q: torch.Tensor
    """``[T, 64, 128]``."""
    index_k: torch.Tensor
    """``[T, 128]``."""
    head_weights: torch.Tensor
    """``[T, 64]``."""
    norm: torch.Tensor
    """``[1536]``: weights of every norm, as many as it has; biases are zero."""

    @classmethod
    def random(cls, batch: int, num_heads: int, length: int, num_blocks: int) -> "BlockProblem":
        """Requests of one length, in pages at random places."""
        index = index_problem(batch, 1, length, num_blocks)
        last = length - 1
        frequency = 10_000.0 ** (-torch.arange(0, ROPE_DIM, 2, device="cuda") / ROPE_DIM)
        angles = torch.outer(torch.arange(length, device="cuda"), frequency)

        def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(*shape, device="cuda") * scale).bfloat16()

        return cls(
            index=index,
            positions=torch.full((batch,), last, device="cuda"),
            cos_sin=torch.cat((angles.cos(), angles.sin()), dim=1),
            slots=index.block_table[:, last // BLOCK_SIZE].long() * BLOCK_SIZE + last % BLOCK_SIZE,
            q_c=random(batch, Q_LORA_RANK),
            kv_c=random(batch, KV_LORA_RANK),
            k_pe=random(batch, ROPE_DIM),
            q=random(batch, num_heads, NOPE_DIM + ROPE_DIM),
            w_uk_t=random(num_heads, NOPE_DIM, KV_LORA_RANK, scale=NOPE_DIM**-0.5),
            index_q=random(batch, NUM_INDEX_HEADS, INDEX_DIM),
            index_k=random(batch, INDEX_DIM),
            head_weights=random(batch, NUM_INDEX_HEADS),
            norm=torch.ones(Q_LORA_RANK, device="cuda", dtype=torch.bfloat16),
        )


Prepared = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Queries of attention, ``[T, N, 576]``; index queries and their weights."""


def prepare(
    kernels: KernelSet, x: BlockProblem, cache: torch.Tensor, index_cache: torch.Tensor
) -> Callable[[], Prepared]:
    """What ours does before it scores: vLLM's norm of ``q_c``, then all else, and both caches written."""
    from vllm import _custom_ops

    q_c = torch.empty_like(x.q_c)
    index_k, head_weights = x.index_k.float(), x.head_weights.float()
    key_norm = x.norm[:INDEX_DIM].float()
    key_bias = torch.zeros_like(key_norm)

    def call() -> Prepared:
        _custom_ops.rms_norm(q_c, x.q_c, x.norm, EPS)
        return kernels.keys_and_queries(
            x.positions,
            x.cos_sin,
            RopeLayout.NEOX,
            Latents(x.kv_c, x.k_pe, x.norm[:KV_LORA_RANK], EPS, x.slots, cache),
            IndexKeys(index_k, key_norm, key_bias, EPS, x.slots, index_cache),
            IndexQueries(x.index_q, head_weights),
            MlaQueries(x.q, x.w_uk_t),
        )

    return call


def ours(
    kernels: KernelSet, x: BlockProblem, cache: torch.Tensor, index_cache: torch.Tensor, scale: float
) -> Block:
    """As :class:`vllm_dsv32.attention.sparse_attention.SparseAttention` does it."""
    topk_slot = torch.empty(len(x.positions), TOPK, dtype=torch.int32, device="cuda")
    num_selected = x.index.num_keys.clamp(max=TOPK)
    prepared = prepare(kernels, x, cache, index_cache)

    def call() -> Attended:
        mla_q, q_fp8, weights = prepared()
        select(
            kernels,
            q_fp8,
            weights,
            index_cache,
            x.index.block_table,
            x.index.request_ids,
            x.index.num_keys,
            x.index.num_keys,
            x.index.max_num_keys,
            x.index.block_table,
            BLOCK_SIZE,
            topk_slot,
        )
        return Attended(kernels.sparse_mla(mla_q, cache, topk_slot, num_selected, scale)[0], topk_slot)

    return call


def latents_at(cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """float32 ``[T, 576]``: what a cache holds at these slots, of either format."""
    at = (slots // BLOCK_SIZE, slots % BLOCK_SIZE)
    if not is_fp8_ds_mla(cache):
        return cache[at].float()
    views = latent_fp8_views(cache)
    groups = (
        views.nope_fp8.view(torch.uint8)[at].view(torch.float8_e4m3fn).float().unflatten(1, (-1, LATENT_GROUP_SIZE))
    )
    return torch.cat(((groups * views.nope_scale[at].unsqueeze(2)).flatten(1), views.rope[at].float()), dim=1)


Topk = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


def in_tree(
    x: BlockProblem, cache: torch.Tensor, index_cache: torch.Tensor, cache_format: str, topk: Topk, scale: float
) -> Block:
    """vLLM's own kernels; its remap runs on a stream of its own there, beside little."""
    from vllm.models.deepseek_v32.common.kernels import fused_norm_rope, fused_q

    fp8 = cache_format == "fp8_ds_mla"
    num_tokens, num_heads, _ = x.q.shape
    topk_pos = torch.full((num_tokens, TOPK), -1, dtype=torch.int32, device="cuda")
    key_norm = x.norm[:INDEX_DIM].float()
    key_bias = torch.zeros_like(key_norm)
    one = torch.ones(1, device="cuda")
    q_nope, q_pe = x.q.split([NOPE_DIM, ROPE_DIM], dim=-1)
    outputs = torch.empty_like(x.kv_c), torch.empty_like(x.k_pe)

    def call() -> Attended:
        fused_norm_rope(
            x.positions,
            x.q_c,
            x.norm,
            EPS,
            x.kv_c,
            x.norm[:KV_LORA_RANK],
            EPS,
            x.k_pe,
            x.cos_sin,
            x.index_k,
            key_norm,
            key_bias,
            EPS,
            x.cos_sin,
            topk_pos,
            slot_mapping=x.slots,
            indexer_slot_mapping=x.slots,
            indexer_k_cache=index_cache,
            mla_kv_cache=cache,
            mla_kv_cache_dtype=cache_format,
            mla_k_scale=one,
            kv_c_out=outputs[0],
            k_pe_out=outputs[1],
        )
        latent_q = torch.bmm(q_nope.transpose(0, 1), x.w_uk_t).transpose(0, 1)
        q_fp8, weights, q_rotated = fused_q(
            x.positions,
            q_pe,
            x.cos_sin,
            x.index_q,
            x.cos_sin,
            latent_q,
            one,
            x.head_weights,
            INDEX_DIM**-0.5,
            NUM_INDEX_HEADS**-0.5,
            quantize_mqa=False,
        )
        topk(score(q_fp8, weights), x.index.num_keys, topk_pos)
        slots = peers.slots_of(topk_pos, x.index.request_ids, x.index.block_table)
        return Attended(attend(latent_q, q_rotated, slots), slots)

    score = peers.deep_gemm_paged_of(x.index, index_cache)
    attend = _flash_mla(num_heads, cache, scale) if fp8 else _flash_attn3(x, cache, scale)
    call()  # FlashMLA makes its schedule, which vLLM makes once a step
    return call


Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Given both parts of the queries, and slots."""


def _flash_attn3(x: BlockProblem, cache: torch.Tensor, scale: float) -> Attend:
    attend = peers.flash_attn3_of(len(x.q), cache, scale)
    num_selected = x.index.num_keys.clamp(max=TOPK)
    return lambda latent, rope, slots: attend(latent, rope, slots, num_selected)


def _flash_mla(num_heads: int, cache: torch.Tensor, scale: float) -> Attend:
    """With the queries in one, and as many heads as it takes."""
    run = peers.flash_mla_of(cache, scale, one_request=True)

    def attend(latent: torch.Tensor, rope: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        q = latent.new_zeros(len(latent), max(64, num_heads), LATENT_DIM)
        q[:, :num_heads, :KV_LORA_RANK] = latent
        q[:, :num_heads, KV_LORA_RANK:] = rope
        return run(q, slots)[:, :num_heads]

    return attend
