"""What vLLM ships for Hopper, called as vLLM calls it, less what vLLM does around the calls.

Left out, all in the peers' favour: padding of the queries from 16 to 64 heads, the schedules that are made once
a step, and the gathering of index keys for prefill. Nothing of vLLM is imported before it is asked for.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from kernel_table.problems import BLOCK_SIZE, TOPK, IndexProblem, SparseProblem
from vllm_dsv32.kernels.dispatch import Problem, explain
from vllm_dsv32.layout import FP8_DS_MLA, INDEX_HEAD_DIM, KV_LORA_RANK, index_key_views

__all__ = [
    "DEEP_GEMM",
    "FLASH_ATTN3",
    "FLASH_MLA",
    "TOPK_OPS",
    "deep_gemm_paged",
    "deep_gemm_paged_of",
    "deep_gemm_prefill",
    "flash_attn3",
    "flash_attn3_of",
    "flash_mla",
    "flash_mla_of",
    "flash_mla_prefill",
    "refusals",
    "slots_of",
    "top_k_per_row_prefill",
]

FLASH_ATTN3, FLASH_MLA, DEEP_GEMM = "FA3", "FlashMLA", "DeepGEMM"
_MIN_HEADS = 64
_WORKSPACE_NBYTES = 1 << 20


def refusals(problem: Problem) -> dict[str, str]:
    """The peers that cannot run here, with the reason: the refusal of our vendor row that wraps the same code."""
    rows = {
        FLASH_ATTN3: ("sparse_mla", "flash_attn3", "auto"),
        FLASH_MLA: ("sparse_mla", "flash_mla", FP8_DS_MLA),
        DEEP_GEMM: ("index_logits", "deep_gemm", "auto"),
    }
    reasons = {}
    for peer, (operation, name, cache_format) in rows.items():
        answers = explain(operation, replace(problem, cache_format=cache_format))
        reason = next(refusal for row, refusal in answers if row.name == name)
        if reason is None and peer == DEEP_GEMM:  # is timed together with vLLM's top-k
            reason = next(refusal for row, refusal in explain("topk_select", problem) if row.name == "vllm")
        if reason is not None:
            reasons[peer] = reason
    return reasons


Attention = Callable[[], torch.Tensor]
"""Gives ``[T, N, 512]``."""


def flash_attn3(problem: SparseProblem, cache: torch.Tensor, scale: float) -> Attention:
    """Each slot is a page of one row."""
    attend = flash_attn3_of(len(problem.q), cache, scale)
    latent, rope = problem.q[..., :KV_LORA_RANK].contiguous(), problem.q[..., KV_LORA_RANK:].contiguous()
    return lambda: attend(latent, rope, problem.slots, problem.num_valid)


def flash_attn3_of(num_tokens: int, cache: torch.Tensor, scale: float) -> Callable[..., torch.Tensor]:
    """The same for queries in two parts, slots and their numbers that are given later."""
    from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func

    rows = cache.view(-1, cache.shape[2])
    starts = torch.arange(num_tokens + 1, dtype=torch.int32, device="cuda")

    def attend(
        latent: torch.Tensor, rope: torch.Tensor, slots: torch.Tensor, num_valid: torch.Tensor
    ) -> torch.Tensor:
        return flash_attn_varlen_func(
            q=rope,
            k=rows[:, None, None, KV_LORA_RANK:],
            v=rows[:, None, None, :KV_LORA_RANK],
            q_v=latent,
            max_seqlen_q=1,
            cu_seqlens_q=starts,
            max_seqlen_k=TOPK,
            seqused_k=num_valid,
            block_table=slots,
            softmax_scale=scale,
            causal=True,
            fa_version=3,
        )

    return attend


def flash_mla(problem: SparseProblem, cache: torch.Tensor, scale: float, *, one_request: bool) -> Attention:
    """Over the fp8 cache, with each token or all tokens together as a request; the first call schedules."""
    q, num_heads = _padded(problem.q), problem.q.shape[1]
    attend = flash_mla_of(cache, scale, one_request=one_request)
    attend(q, problem.slots)
    return lambda: attend(q, problem.slots)[:, :num_heads]


def flash_mla_of(cache: torch.Tensor, scale: float, *, one_request: bool) -> Callable[..., torch.Tensor]:
    """The same for queries and slots that are given later."""
    from vllm.v1.attention.ops import flashmla  # noqa: F401  registers the operators

    axis = 0 if one_request else 1
    pages = cache.unsqueeze(2).view(torch.float8_e4m3fn)
    schedule: list[Any] = [None, None]

    def attend(q: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        operator = torch.ops._flashmla_C.sparse_decode_fwd
        none = (None, None, None)
        result = operator(
            q.unsqueeze(axis), pages, slots.unsqueeze(axis), None, None, *schedule, *none, KV_LORA_RANK, scale, None
        )
        schedule[:] = result[2:4]
        return result[0].squeeze(axis)

    return attend


def flash_mla_prefill(problem: SparseProblem, cache: torch.Tensor, scale: float) -> Attention:
    """Over the bfloat16 cache."""
    from vllm.v1.attention.ops import flashmla  # noqa: F401  registers the operators

    q, slots = _padded(problem.q), problem.slots.unsqueeze(1)
    rows = cache.view(-1, 1, cache.shape[2])
    num_heads = problem.q.shape[1]
    operator = torch.ops._flashmla_C.sparse_prefill_fwd
    return lambda: operator(q, rows, slots, scale, KV_LORA_RANK, None, None, None)[0][:, :num_heads]


def _padded(q: torch.Tensor) -> torch.Tensor:
    missing = max(0, _MIN_HEADS - q.shape[1])
    return torch.nn.functional.pad(q, (0, 0, 0, missing))


Logits = Callable[[slice], torch.Tensor]
"""Gives ``[t, L]`` for some rows of a problem; what lies past a row's keys is not defined."""


def deep_gemm_paged(problem: IndexProblem, cache: torch.Tensor) -> Logits:
    """Decode: each row is a request."""
    score = deep_gemm_paged_of(problem, cache)
    num_rows = len(problem.num_keys)

    def call(rows: slice) -> torch.Tensor:
        assert rows == slice(0, num_rows), "the schedule is of the whole batch"
        return score(problem.q_fp8, problem.weights)

    return call


def deep_gemm_paged_of(problem: IndexProblem, cache: torch.Tensor) -> Callable[..., torch.Tensor]:
    """The same for queries and weights that are given later."""
    from vllm import _custom_ops  # noqa: F401  registers torch.ops._C
    from vllm.utils import deep_gemm

    lengths = problem.num_keys.unsqueeze(1)
    schedule = deep_gemm.get_paged_mqa_logits_metadata(lengths, BLOCK_SIZE, deep_gemm.get_num_sms())
    keys, width = cache.unsqueeze(2), problem.max_num_keys

    def score(q_fp8: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        q = (q_fp8.unsqueeze(1), None)
        return deep_gemm.fp8_fp4_paged_mqa_logits(
            q, keys, weights, lengths, problem.block_table, schedule, width, clean_logits=False
        )

    return score


def deep_gemm_prefill(problem: IndexProblem, cache: torch.Tensor) -> Logits:
    """Prefill of one request, whose keys are gathered here."""
    from vllm import _custom_ops  # noqa: F401  registers torch.ops._C
    from vllm.utils import deep_gemm

    views = index_key_views(cache)
    blocks = problem.block_table[0].long()
    key_fp8 = views.key_fp8.view(torch.uint8)[blocks].view(torch.float8_e4m3fn).view(-1, INDEX_HEAD_DIM)
    keys = (key_fp8[: problem.max_num_keys], views.key_scale[blocks].flatten()[: problem.max_num_keys])
    begins = torch.zeros_like(problem.num_keys)
    return lambda rows: deep_gemm.fp8_fp4_mqa_logits(
        (problem.q_fp8[rows], None),
        keys,
        problem.weights[rows],
        begins[rows],
        problem.num_keys[rows],
        clean_logits=False,
    )


def _cooperative_topk(logits: torch.Tensor, num_keys: torch.Tensor, topk_pos: torch.Tensor) -> None:
    torch.ops._C.cooperative_topk(logits, num_keys, topk_pos, _workspace(), TOPK, logits.shape[1])


def _persistent_topk(logits: torch.Tensor, num_keys: torch.Tensor, topk_pos: torch.Tensor) -> None:
    torch.ops._C.persistent_topk(logits, num_keys, topk_pos, _workspace(), TOPK, logits.shape[1])


def _top_k_per_row_decode(logits: torch.Tensor, num_keys: torch.Tensor, topk_pos: torch.Tensor) -> None:
    strides = logits.stride()
    torch.ops._C.top_k_per_row_decode(logits, 1, num_keys, topk_pos, len(logits), *strides, TOPK)


def top_k_per_row_prefill(
    logits: torch.Tensor, begins: torch.Tensor, num_keys: torch.Tensor, topk_pos: torch.Tensor
) -> None:
    """Of each row the columns from `begins` to `num_keys`."""
    strides = logits.stride()
    torch.ops._C.top_k_per_row_prefill(logits, begins, num_keys, topk_pos, len(logits), *strides, TOPK)


TOPK_OPS = {
    "cooperative_topk": _cooperative_topk,
    "persistent_topk": _persistent_topk,
    "top_k_per_row_decode": _top_k_per_row_decode,
}
"""Of decode. The first takes up to 64 rows."""


def slots_of(topk_pos: torch.Tensor, request_ids: torch.Tensor, block_table: torch.Tensor) -> torch.Tensor:
    """In pages of 64 tokens, int32 ``[T, 2048]``; counts them too, as vLLM's backends for bfloat16 have it done."""
    from vllm.v1.attention.backends.mla.sparse_utils import triton_convert_req_index_to_global_index

    slots, _ = triton_convert_req_index_to_global_index(
        request_ids,
        block_table,
        topk_pos,
        BLOCK_SIZE=BLOCK_SIZE,
        NUM_TOPK_TOKENS=TOPK,
        return_valid_counts=True,
    )
    return slots


_workspaces: list[torch.Tensor] = []


def _workspace() -> torch.Tensor:
    """Of all calls: allocating and clearing one is vLLM's work once a process."""
    if not _workspaces:
        _workspaces.append(torch.zeros(_WORKSPACE_NBYTES, dtype=torch.uint8, device="cuda"))
    return _workspaces[0]
