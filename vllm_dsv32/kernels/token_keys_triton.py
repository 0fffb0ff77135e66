"""Operation ``token_keys`` in Triton: each token counts the requests that end before it."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from vllm_dsv32.kernels.triton_compilation import Compilation
from vllm_dsv32.kernels.triton_dependent_launch import dependence, launch_options, wait_for_launches_before
from vllm_dsv32.kernels.triton_device import ceil_div

__all__ = ["compilations", "token_keys"]

_TOKENS = 64
_REQUESTS = 64
_NUM_WARPS = 4


@triton.jit(
    do_not_specialize=["num_requests", "num_tokens", "topk"],
    do_not_specialize_on_alignment=["query_start_loc_ptr", "seq_lens_ptr"],
)
def _token_keys_kernel(
    query_start_loc_ptr: tl.tensor,
    seq_lens_ptr: tl.tensor,
    request_ids_ptr: tl.tensor,
    num_keys_ptr: tl.tensor,
    num_scored_ptr: tl.tensor,
    num_selected_ptr: tl.tensor,
    num_requests: tl.tensor,
    num_tokens: tl.tensor,
    topk: tl.tensor,
    TOKENS: tl.constexpr,
    REQUESTS: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    wait_for_launches_before(DEPENDENT)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    request = tl.zeros((TOKENS,), tl.int32)
    for begin in range(0, num_requests, REQUESTS):
        candidate = begin + tl.arange(0, REQUESTS)
        # What does not exist ends after every token.
        end = tl.load(query_start_loc_ptr + 1 + candidate, mask=candidate < num_requests, other=0x7FFFFFFF)
        request += tl.sum((end[None, :] <= token[:, None]).to(tl.int32), axis=1)
    is_padding = request >= num_requests
    request = tl.minimum(request, num_requests - 1)
    end = tl.load(query_start_loc_ptr + 1 + request)
    num_keys = tl.maximum(tl.load(seq_lens_ptr + request) - (end - 1 - token), 0)
    num_keys = tl.where(is_padding, 0, num_keys)
    exists = token < num_tokens
    tl.store(request_ids_ptr + token, request, mask=exists)
    tl.store(num_keys_ptr + token, num_keys, mask=exists)
    tl.store(num_scored_ptr + token, tl.where(num_keys > topk, num_keys, 0), mask=exists)
    tl.store(num_selected_ptr + token, tl.minimum(num_keys, topk), mask=exists)


def token_keys(
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    topk: int,
    request_ids: torch.Tensor,
    num_keys: torch.Tensor,
    num_scored: torch.Tensor,
    num_selected: torch.Tensor,
) -> None:
    """See :func:`vllm_dsv32.kernels.token_keys.reference`."""
    num_tokens = request_ids.shape[0]
    if num_tokens == 0:
        return
    _token_keys_kernel[(ceil_div(num_tokens, _TOKENS),)](
        query_start_loc,
        seq_lens,
        request_ids,
        num_keys,
        num_scored,
        num_selected,
        seq_lens.shape[0],
        num_tokens,
        topk,
        TOKENS=_TOKENS,
        REQUESTS=_REQUESTS,
        num_warps=_NUM_WARPS,
        **launch_options(seq_lens.device),
    )


def compilations(capability: tuple[int, int]) -> Iterator[Compilation]:
    """The one kernel."""
    yield Compilation(
        name="token_keys",
        kernel=_token_keys_kernel,
        signature={
            "query_start_loc_ptr": "*i32",
            "seq_lens_ptr": "*i32",
            "request_ids_ptr": "*i32",
            "num_keys_ptr": "*i32",
            "num_scored_ptr": "*i32",
            "num_selected_ptr": "*i32",
            "num_requests": "i32",
            "num_tokens": "i32",
            "topk": "i32",
        },
        constexprs={"TOKENS": _TOKENS, "REQUESTS": _REQUESTS, **dependence(capability)},
        num_warps=_NUM_WARPS,
        num_stages=1,
    )
