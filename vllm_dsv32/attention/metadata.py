"""What the kernels need to know of a batch, and the builders that derive it from vLLM's description."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

from vllm_dsv32.config import ModelDims, kernel_overrides, kernel_problem
from vllm_dsv32.kernels.dispatch import KernelSet, select_kernels

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheSpec

__all__ = ["CacheMetadata", "CacheMetadataBuilder", "DsaMetadata", "DsaMetadataBuilder"]


@dataclass
class CacheMetadata(AttentionMetadata):
    """Where one step's tokens lie in a cache. T counts them without vLLM's padding, R their requests."""

    slots: torch.Tensor
    """int64 ``[T]``: where each token's cache rows are written; -1 for padding."""
    block_table: torch.Tensor
    """int32 ``[R, max_blocks]``."""


@dataclass
class DsaMetadata(CacheMetadata):
    """One step's batch."""

    num_actual_tokens: int
    """T."""
    request_ids: torch.Tensor
    """int32 ``[T]``: each token's row in the block table; tokens of a request are adjacent."""
    num_keys: torch.Tensor
    """int32 ``[T]``: how many positions of its request a token sees, its own included; 0 for padding."""
    num_scored: torch.Tensor
    """int32 ``[T]``: ``num_keys``, or 0 where the top-k takes all of them."""
    num_selected: torch.Tensor
    """int32 ``[T]``: ``num_keys``, at most the top-k."""
    max_num_keys: int
    """At least ``max(num_keys)``; known on the host, so it may overestimate."""
    max_query_len: int
    """Tokens of the request that has most in this step."""


class CacheMetadataBuilder(AttentionMetadataBuilder[CacheMetadata]):
    """Of a cache that is only written and read: passes on what vLLM says of its pages."""

    def __init__(
        self,
        kv_cache_spec: "KVCacheSpec",
        layer_names: list[str],
        vllm_config: "VllmConfig",
        device: torch.device,
    ) -> None:
        # vLLM's is abstract.
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: "VllmConfig", kv_cache_spec: "KVCacheSpec") -> AttentionCGSupport:
        """Whole-step graphs need every chosen kernel to be capturable; one that waits for the host is not."""
        capturable = _kernels(vllm_config).graph_capturable
        return AttentionCGSupport.UNIFORM_BATCH if capturable else AttentionCGSupport.NEVER

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CacheMetadata:
        """Describe a step. See :class:`vllm.v1.attention.backend.AttentionMetadataBuilder`."""
        return CacheMetadata(**_placement(common_attn_metadata))


class DsaMetadataBuilder(CacheMetadataBuilder):
    """Derives :class:`DsaMetadata`.

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
        self._token_keys = _kernels(vllm_config).token_keys
        self._topk = ModelDims.from_hf_config(vllm_config.model_config.hf_config).topk
        self._max_model_len = vllm_config.model_config.max_model_len
        max_num_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        # Captured graphs read a step's values from where those of the capture were: four rows of one buffer.
        # Each begins at a multiple of 16 bytes, for which the kernels that read them are compiled.
        self._per_token = torch.zeros((4, -(-max_num_tokens // 4) * 4), dtype=torch.int32, device=device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> DsaMetadata:
        """Describe a step. See :class:`vllm.v1.attention.backend.AttentionMetadataBuilder`."""
        common = common_attn_metadata
        per_token = self._per_token[:, : common.num_actual_tokens]
        self._token_keys(common.query_start_loc, common.seq_lens, self._topk, *per_token)
        request_ids, num_keys, num_scored, num_selected = per_token
        return DsaMetadata(
            **_placement(common),
            num_actual_tokens=common.num_actual_tokens,
            request_ids=request_ids,
            num_keys=num_keys,
            num_scored=num_scored,
            num_selected=num_selected,
            max_num_keys=min(common.max_seq_len, self._max_model_len),
            max_query_len=common.max_query_len,
        )


def _kernels(vllm_config: "VllmConfig") -> KernelSet:
    problem = kernel_problem(vllm_config, vllm_config.cache_config.cache_dtype)
    return select_kernels(problem, kernel_overrides(vllm_config))


def _placement(common: CommonAttentionMetadata) -> dict[str, torch.Tensor]:
    return {
        "slots": common.slot_mapping[: common.num_actual_tokens],
        "block_table": common.block_table_tensor,
    }
