"""Operation ``topk_select`` by vLLM's own kernels: a top-k, and the translation of positions into slots."""

import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.mla.sparse_utils import triton_convert_req_index_to_global_index

__all__ = ["topk_select"]

_WORKSPACE_NBYTES = 1 << 20
_MAX_COOPERATIVE_ROWS = 64
_MIN_PREFILL_ROWS = 512


def topk_select(
    logits: torch.Tensor,
    num_keys: torch.Tensor,
    request_ids: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
    topk_slot: torch.Tensor,
) -> None:
    """The set of :func:`vllm_dsv32.kernels.topk_select.reference`, but for ties and order; no logit may be NaN.

    Which of equal logits win, and the order of the slots, are the kernels' own and may differ from run to run. The
    slots still come first, and -1 in what is left over.

    The kernel is the one that vLLM takes for a decode batch of up to 64 rows, for a larger one, and for
    prefill; as a batch here does not say what it is, 512 rows or more count as prefill. It writes positions, and
    vLLM turns them into slots in a launch of its own.
    """
    topk_pos = torch.full_like(topk_slot, -1)
    _select(logits, num_keys, topk_pos)
    if len(topk_pos):
        triton_convert_req_index_to_global_index(
            request_ids,
            block_table,
            topk_pos,
            BLOCK_SIZE=block_size,
            NUM_TOPK_TOKENS=topk_pos.shape[1],
            out=topk_slot,
        )


def _select(logits: torch.Tensor, num_keys: torch.Tensor, topk_pos: torch.Tensor) -> None:
    """Write positions over as many of the -1."""
    num_rows, width = logits.shape
    k = topk_pos.shape[1]
    if num_rows == 0 or width == 0:
        return
    if num_rows >= _MIN_PREFILL_ROWS:
        begins = torch.zeros_like(num_keys)
        stride, key_stride = logits.stride()
        ops.top_k_per_row_prefill(logits, begins, num_keys, topk_pos, num_rows, stride, key_stride, k)
        return
    # Zeros: no kernel promises to clear what another one left there.
    workspace = torch.zeros(_WORKSPACE_NBYTES, dtype=torch.uint8, device=logits.device)
    cooperative = num_rows <= _MAX_COOPERATIVE_ROWS and logits.stride(0) % 4 == 0 and _has_clusters(logits.device)
    select = torch.ops._C.cooperative_topk if cooperative else torch.ops._C.persistent_topk
    select(logits, num_keys, topk_pos, workspace, k, width)


def _has_clusters(device: torch.device) -> bool:
    """Of a size that the cooperative kernel needs."""
    return torch.cuda.get_device_capability(device)[0] in (9, 10)
