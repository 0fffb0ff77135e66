"""Operation ``index_logits`` by the DeepGEMM that vLLM ships."""

import torch
from vllm import _custom_ops as ops
from vllm.utils import deep_gemm

from vllm_dsv32.compat import mqa_logits_options, paged_mqa_logits_options
from vllm_dsv32.layout import INDEX_HEAD_DIM

__all__ = ["index_logits"]

_BLOCK_SIZE = 64
_PREFILL_ROWS_PER_REQUEST = 8


def index_logits(
    q_fp8: torch.Tensor,
    weights: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    request_ids: torch.Tensor,
    num_keys: torch.Tensor,
    max_num_keys: int,
) -> torch.Tensor:
    """See :func:`vllm_dsv32.kernels.index_logits.reference`.

    Batches of few rows a request go to the paged kernel, each row as a request of its own. Of other batches
    the keys of each request are gathered first, which waits for the device; they are prefill, and never part
    of a captured graph.

    Raises:
        ValueError: the cache's block size is not 64.
    """
    if cache.shape[1] != _BLOCK_SIZE:
        raise ValueError(
            f"index_logits by deep_gemm: expected a cache with blocks of {_BLOCK_SIZE} tokens, "
            f"got {cache.shape[1]}; use --block-size {_BLOCK_SIZE} or another implementation"
        )
    num_rows = q_fp8.shape[0]
    if num_rows == 0 or max_num_keys == 0:
        return q_fp8.new_empty((num_rows, max_num_keys), dtype=torch.float32)
    score = _paged if num_rows < _PREFILL_ROWS_PER_REQUEST * block_table.shape[0] else _gathered
    return score(q_fp8, weights, cache, block_table, request_ids, num_keys, max_num_keys)


def _paged(
    q_fp8: torch.Tensor,
    weights: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    request_ids: torch.Tensor,
    num_keys: torch.Tensor,
    max_num_keys: int,
) -> torch.Tensor:
    context_lens = num_keys.unsqueeze(1)
    schedule = deep_gemm.get_paged_mqa_logits_metadata(context_lens, _BLOCK_SIZE, deep_gemm.get_num_sms())
    return deep_gemm.fp8_fp4_paged_mqa_logits(
        (q_fp8.unsqueeze(1), None),
        cache.unsqueeze(2),
        weights,
        context_lens,
        block_table[request_ids],
        schedule,
        max_num_keys,
        **paged_mqa_logits_options(),
    )


def _gathered(
    q_fp8: torch.Tensor,
    weights: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    request_ids: torch.Tensor,
    num_keys: torch.Tensor,
    max_num_keys: int,
) -> torch.Tensor:
    requests, counts = torch.unique_consecutive(request_ids, return_counts=True)
    parts = []
    begin = 0
    for request, count in zip(requests.tolist(), counts.tolist(), strict=True):
        rows = slice(begin, begin + count)
        begin += count
        seen = int(num_keys[rows].max())
        # The width of the result is that of the keys; those past the last one are not scored.
        key_fp8 = torch.empty((max_num_keys, INDEX_HEAD_DIM), dtype=torch.float8_e4m3fn, device=cache.device)
        key_scale = torch.empty((max_num_keys, 4), dtype=torch.uint8, device=cache.device)
        if seen:
            ends = torch.tensor([0, seen], dtype=torch.int32, device=cache.device)
            ops.cp_gather_indexer_k_quant_cache(
                cache, key_fp8[:seen], key_scale[:seen], block_table[request : request + 1], ends
            )
        parts.append(
            deep_gemm.fp8_fp4_mqa_logits(
                (q_fp8[rows], None),
                (key_fp8, key_scale.view(torch.float32).squeeze(1)),
                weights[rows],
                torch.zeros_like(num_keys[rows]),
                num_keys[rows],
                **mqa_logits_options(max_num_keys),
            )
        )
    return parts[0] if len(parts) == 1 else torch.cat(parts)
