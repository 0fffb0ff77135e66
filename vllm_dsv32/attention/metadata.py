"""What the kernels need to know of a batch, and the builder that derives it from vLLM's description."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

from vllm_dsv32.config import kernel_overrides, kernel_problem
from vllm_dsv32.kernels.dispatch import select_kernels

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheSpec

__all__ = ["DsaMetadata", "DsaMetadataBuilder", "keys_per_token"]


@dataclass
class DsaMetadata(AttentionMetadata):
    """One step's batch. T counts its tokens without vLLM's padding, R its requests."""

    num_actual_tokens: int
    """T."""
    slots: torch.Tensor
    """int64 ``[T]``: where each token's cache rows are written; -1 for padding."""
    request_ids: torch.Tensor
    """int32 ``[T]``: each token's row in the block table; tokens of a request are adjacent."""
    num_keys: torch.Tensor
    """int32 ``[T]``: how many positions of its request a token sees, its own included; 0 for padding."""
    max_num_keys: int
    """At least ``max(num_keys)``; known on the host, so it may overestimate."""
    block_table: torch.Tensor
    """int32 ``[R, max_blocks]``."""


class DsaMetadataBuilder(AttentionMetadataBuilder[DsaMetadata]):
    """Derives :class:`DsaMetadata`; one class serves the latent cache and the index keys.

    Every token is described by its request and the number of keys that it sees. Prefill, chunked prefill,
    decode, speculative decode and any mixture of them are the same to the kernels, so batches need not be
    reordered, and a request of length zero (as in graph capture and on idle data-parallel ranks) is a
    request without keys. Nothing here waits for the device.
    """

    def __init__(
        self,
        kv_cache_spec: "KVCacheSpec",
        layer_names: list[str],
        vllm_config: "VllmConfig",
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        max_num_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self._token_ids = torch.arange(max_num_tokens, dtype=torch.int32, device=device)
        self._max_model_len = vllm_config.model_config.max_model_len

    @classmethod
    def get_cudagraph_support(cls, vllm_config: "VllmConfig", kv_cache_spec: "KVCacheSpec") -> AttentionCGSupport:
        """Whole-step graphs need every chosen kernel to be capturable; one that waits for the host is not."""
        problem = kernel_problem(vllm_config, vllm_config.cache_config.cache_dtype)
        kernels = select_kernels(problem, kernel_overrides(vllm_config))
        return AttentionCGSupport.UNIFORM_BATCH if kernels.graph_capturable else AttentionCGSupport.NEVER

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> DsaMetadata:
        """Describe a step. See :class:`vllm.v1.attention.backend.AttentionMetadataBuilder`."""
        common = common_attn_metadata
        num_tokens = common.num_actual_tokens
        request_ids, num_keys = keys_per_token(
            common.query_start_loc, common.seq_lens, self._token_ids[:num_tokens]
        )
        return DsaMetadata(
            num_actual_tokens=num_tokens,
            slots=common.slot_mapping[:num_tokens],
            request_ids=request_ids,
            num_keys=num_keys,
            max_num_keys=min(common.max_seq_len, self._max_model_len),
            block_table=common.block_table_tensor,
        )


def keys_per_token(
    query_start_loc: torch.Tensor, seq_lens: torch.Tensor, token_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The request of each token and the number of positions that it sees.

    Args:
        query_start_loc: int32 ``[R + 1]``; request r has the tokens from ``[r]`` up to ``[r + 1]``.
        seq_lens: int32 ``[R]``: positions of each request, this step's tokens included.
        token_ids: int32 ``[T]``, 0 to T - 1; those at or past ``query_start_loc[R]`` are padding.

    Returns:
        int32 ``request_ids`` and ``num_keys``, each ``[T]``; padding gets the last request and 0 keys.
    """
    ends = query_start_loc[1:]
    request_ids = torch.searchsorted(ends, token_ids, right=True, out_int32=True)
    padding = request_ids >= seq_lens.shape[0]
    request_ids = request_ids.clamp(max=seq_lens.shape[0] - 1)
    num_keys = seq_lens[request_ids] - (ends[request_ids] - 1 - token_ids)
    return request_ids, num_keys.clamp(min=0).masked_fill(padding, 0).to(torch.int32)
