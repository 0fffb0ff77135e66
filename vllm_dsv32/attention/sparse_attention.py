"""DeepSeek sparse attention over the two caches: write, score, select, attend."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.utils.quant_utils import get_and_maybe_dequant_weights

from vllm_dsv32.attention.backend import GPU_BLOCK_SIZE
from vllm_dsv32.attention.caches import IndexKeyCache, LatentCache
from vllm_dsv32.attention.derived_weights import set_buffer
from vllm_dsv32.attention.graph_break import require_graph_break
from vllm_dsv32.attention.metadata import DsaMetadata
from vllm_dsv32.attention.shared_selection import SelectionShare, select_shared
from vllm_dsv32.compat import keep_plain_weight
from vllm_dsv32.config import ModelDims, kernel_overrides, kernel_problem, shared_selection_from
from vllm_dsv32.kernels.dispatch import select_kernels
from vllm_dsv32.kernels.index_insert import IndexKeys
from vllm_dsv32.kernels.index_query import IndexQueries
from vllm_dsv32.kernels.latent_insert import Latents
from vllm_dsv32.kernels.mla_query import MlaQueries
from vllm_dsv32.kernels.selection import LOGITS_NBYTES, select
from vllm_dsv32.kernels.warmup import warm_up

if TYPE_CHECKING:
    from vllm.model_executor.layers.layernorm import RMSNorm
    from vllm.model_executor.layers.linear import ColumnParallelLinear

__all__ = ["SparseAttention"]

logger = init_logger("vllm.plugins.dsv32")


class SparseAttention(LatentCache):
    """The part of an attention layer between its projections.

    Owns the latent cache and the absorbed halves of ``kv_b_proj``; uses the index-key cache of its indexer.
    All of it runs in one call outside captured graph segments, because all of it depends on the batch.
    """

    def __init__(
        self,
        dims: ModelDims,
        num_heads: int,
        kv_norm: "RMSNorm",
        kv_b_proj: "ColumnParallelLinear",
        index_k_norm: torch.nn.LayerNorm,
        derive_index_weights: Callable[[], None],
        topk_indices_buffer: torch.Tensor,
        prefix: str,
    ) -> None:
        """Build the layer and choose its kernels.

        Args:
            dims: of the model.
            num_heads: on this rank.
            kv_norm: the latent's norm; its weight is applied on insertion.
            kv_b_proj: ``kv_lora_rank -> num_heads * (nope + v)``; absorbed after loading.
            index_k_norm: the index key's norm, applied on insertion.
            derive_index_weights: what the indexer makes of its weights. Of all modules, vLLM tells attention layers
                alone that weights are as they stay, at first and when a running engine gets others.
            topk_indices_buffer: int32 ``[max_num_batched_tokens, K]``, shared by all layers, each of which
                overwrites it with slots of its own cache. vLLM points the modules of a draft model at the
                target's buffer, so it is read anew in every step.
            prefix: the layer's name in vLLM.

        Raises:
            KernelUnavailableError: an operation has no implementation here.
            ConfigError: this module was imported too early for CUDA graphs.
        """
        super().__init__(dims.kv_lora_rank + dims.rope_dim, prefix)
        self.dims = dims
        self.num_heads = num_heads
        self.topk_indices_buffer = topk_indices_buffer
        self.index_keys = IndexKeyCache(f"{prefix}.index_keys")
        self.kv_norm = kv_norm
        self.kv_b_proj = kv_b_proj
        keep_plain_weight(kv_b_proj)
        self.index_k_norm = index_k_norm
        self._derive_index_weights = derive_index_weights
        vllm_config = get_current_vllm_config()
        require_graph_break(SparseAttention.forward, vllm_config.compilation_config.cudagraph_mode)
        problem, overrides = kernel_problem(vllm_config, self.kv_cache_dtype), kernel_overrides(vllm_config)
        self.kernels = select_kernels(problem, overrides)
        self._max_model_len = vllm_config.model_config.max_model_len
        group = get_tp_group()
        self._share = SelectionShare(
            group.rank_in_group,
            group.world_size,
            partial(group.all_gather, dim=0),
            shared_selection_from(vllm_config),
        )
        cache_config = vllm_config.cache_config
        self._warm_up = partial(
            warm_up,
            problem,
            tuple(sorted(overrides.items())),
            cache_config.block_size if cache_config.user_specified_block_size else GPU_BLOCK_SIZE,
            self._max_model_len,
            vllm_config.scheduler_config.max_num_batched_tokens,
            vllm_config.scheduler_config.max_num_seqs,
            dims.nope_dim,
            dims.index_rope_layout,
        )
        logger.info_once(
            "vllm-dsv32 serves this model; KV cache %s; kernels: %s",
            self.kv_cache_dtype,
            ", ".join(f"{operation}={name}" for operation, name in self.kernels.names.items()),
        )

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Split ``kv_b_proj`` into ``w_uk_t`` ``[N, nope, rank]`` and ``w_uv`` ``[N, rank, v]``; compile kernels.

        vLLM calls it, before it measures how much memory is left for the caches.
        """
        dims = self.dims
        weight = get_and_maybe_dequant_weights(self.kv_b_proj, out_dtype=act_dtype)
        per_head = weight.view(self.num_heads, dims.nope_dim + dims.v_dim, dims.kv_lora_rank)
        w_uk_t, w_uv_t = per_head.split([dims.nope_dim, dims.v_dim], dim=1)
        set_buffer(self, "w_uk_t", w_uk_t.contiguous())
        set_buffer(self, "w_uv", w_uv_t.transpose(1, 2).contiguous())
        self._derive_index_weights()
        self._warm_up()

    def _take_memory(self, q: torch.Tensor) -> None:
        """Take, and give back, what a batch of so many tokens takes, as vLLM measures it to size the caches."""
        dims, num_tokens, topk = self.dims, q.shape[0], self.topk_indices_buffer.shape[1]
        row = 2 * dims.kv_lora_rank + dims.rope_dim  # of the absorbed query, and of the result
        index_nbytes = num_tokens * dims.num_index_heads * (dims.index_head_dim + 4)  # of its queries and weights
        logits = min(LOGITS_NBYTES, 4 * num_tokens * self._max_model_len) if self._max_model_len > topk else 0
        scratch = self.kernels.scratch_nbytes
        held = [
            q.new_empty((num_tokens, self.num_heads, row)),
            q.new_empty(index_nbytes, dtype=torch.uint8),
            # One after the other.
            q.new_empty(max(logits + scratch["topk_select"], scratch["sparse_mla"]), dtype=torch.uint8),
        ]
        del held

    @eager_break_during_capture
    def forward(
        self,
        positions: torch.Tensor,
        cos_sin_cache: torch.Tensor,
        q: torch.Tensor,
        kv_c: torch.Tensor,
        k_pe: torch.Tensor,
        index_q: torch.Tensor,
        index_k: torch.Tensor,
        head_weights: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """Insert the tokens' keys into both caches, select for each query, and attend.

        T' is T with vLLM's padding behind it.

        Args:
            positions: int64 ``[T']``.
            cos_sin_cache: float32 ``[max_position, rope]``.
            q: ``[T', N, nope + rope]``, not rotated.
            kv_c: ``[T', rank]``, not normalised.
            k_pe: ``[T', rope]``, not rotated.
            index_q: ``[T', H, D]``, not rotated.
            index_k: float32 ``[T', D]``, not normalised.
            head_weights: float32 ``[T', H]``.
            output: ``[T', N * v]``, overwritten; zeros in a dummy run and for padding.
        """
        metadata, index_metadata = self.metadata(), self.index_keys.metadata()
        if metadata is None or index_metadata is None:
            # Data-parallel ranks without work must agree on what the experts see.
            output.zero_()
            self._take_memory(q)
            return
        assert isinstance(metadata, DsaMetadata)
        num_tokens = metadata.num_actual_tokens
        output[num_tokens:].zero_()
        if num_tokens == 0:
            return
        mla_q, q_fp8, weights = self.kernels.keys_and_queries(
            positions[:num_tokens],
            cos_sin_cache,
            self.dims.index_rope_layout,
            Latents(
                kv_c[:num_tokens],
                k_pe[:num_tokens],
                self.kv_norm.weight,
                self.kv_norm.variance_epsilon,
                metadata.slots,
                self.kv_cache,
            ),
            IndexKeys(
                index_k[:num_tokens],
                self.index_k_norm.weight,
                self.index_k_norm.bias,
                self.index_k_norm.eps,
                index_metadata.slots,
                self.index_keys.kv_cache,
            ),
            IndexQueries(index_q[:num_tokens], head_weights[:num_tokens]),
            MlaQueries(q[:num_tokens], self.get_buffer("w_uk_t")),
        )
        topk_slot = self.topk_indices_buffer[:num_tokens]
        shared = self._share.takes(num_tokens, metadata.max_query_len, metadata.max_num_keys)
        select_all = partial(select_shared, self._share) if shared else select
        select_all(
            self.kernels,
            q_fp8,
            weights,
            self.index_keys.kv_cache,
            index_metadata.block_table,
            metadata.request_ids,
            metadata.num_keys,
            metadata.num_scored,
            metadata.max_num_keys,
            metadata.block_table,
            self.kv_cache.shape[1],
            topk_slot,
        )
        latent, _ = self.kernels.sparse_mla(
            mla_q, self.kv_cache, topk_slot, metadata.num_selected, self.dims.softmax_scale
        )
        self.kernels.mla_output(latent, self.get_buffer("w_uv"), output[:num_tokens])
