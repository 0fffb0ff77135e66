"""The projections around sparse attention: multi-head latent attention and the lightning indexer."""

from typing import TYPE_CHECKING

import torch
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import get_and_maybe_dequant_weights
from vllm.model_executor.layers.rotary_embedding import get_rope

from vllm_dsv32.attention.derived_weights import set_buffer
from vllm_dsv32.attention.sparse_attention import SparseAttention
from vllm_dsv32.compat import keep_plain_weight
from vllm_dsv32.config import ModelDims
from vllm_dsv32.errors import ConfigError

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization import QuantizationConfig

__all__ = ["Dsv32Attention", "Indexer"]

_INDEX_NORM_EPS = 1e-6


class Indexer(torch.nn.Module):
    """The lightning indexer's projections; every rank has all index heads."""

    def __init__(self, dims: ModelDims, quant_config: "QuantizationConfig | None", prefix: str) -> None:
        super().__init__()
        self.num_heads, self.head_dim = dims.num_index_heads, dims.index_head_dim
        self.wq_b = ReplicatedLinear(
            dims.q_lora_rank,
            self.num_heads * self.head_dim,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.wq_b",
        )
        self.wk = ReplicatedLinear(
            dims.hidden_size, self.head_dim, bias=False, quant_config=quant_config, prefix=f"{prefix}.wk"
        )
        keep_plain_weight(self.wk)
        self.k_norm = torch.nn.LayerNorm(self.head_dim, eps=_INDEX_NORM_EPS, dtype=torch.float32)
        self.weights_proj = ReplicatedLinear(
            dims.hidden_size, self.num_heads, bias=False, prefix=f"{prefix}.weights_proj"
        )
        keep_plain_weight(self.weights_proj)

    def join_weights(self) -> None:
        """Join ``wk`` and ``weights_proj`` into ``wk_weights_proj`` ``[D + H, hidden]``: one product for both."""
        head_weights = self.weights_proj.weight
        key = get_and_maybe_dequant_weights(self.wk, out_dtype=head_weights.dtype)
        set_buffer(self, "wk_weights_proj", torch.cat((key, head_weights)))

    def forward(
        self, hidden_states: torch.Tensor, q_c: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Project.

        Args:
            hidden_states: ``[T, hidden]``.
            q_c: ``[T, q_lora_rank]``, normalised.

        Returns:
            ``index_q`` ``[T, H, D]``, and in float32 ``index_k`` ``[T, D]`` and ``head_weights`` ``[T, H]``.
        """
        index_q = self.wq_b(q_c)[0].view(-1, self.num_heads, self.head_dim)
        index_k, head_weights = self._keys_and_weights(hidden_states).split([self.head_dim, self.num_heads], dim=-1)
        return index_q, index_k, head_weights

    def _keys_and_weights(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """In float32, as in DeepSeek's own code: weights in bfloat16 flip selections that are nearly tied."""
        weight = self.get_buffer("wk_weights_proj")
        if hidden_states.is_cuda and hidden_states.dtype == torch.bfloat16:
            # Products of bfloat16 are exact in the float32 that tensor cores add them up in.
            return torch.mm(hidden_states, weight.t(), out_dtype=torch.float32)
        return torch.nn.functional.linear(hidden_states.float(), weight.float())


class Dsv32Attention(torch.nn.Module):
    """One attention layer: MLA in absorbed form over the keys that the indexer selects."""

    def __init__(
        self,
        dims: ModelDims,
        quant_config: "QuantizationConfig | None",
        topk_indices_buffer: torch.Tensor,
        prefix: str,
    ) -> None:
        """Build the layer.

        Raises:
            ConfigError: the heads do not divide among the tensor-parallel ranks.
        """
        super().__init__()
        tp_size = get_tensor_model_parallel_world_size()
        if dims.num_heads % tp_size:
            raise ConfigError(
                f"{dims.num_heads} attention heads do not divide among {tp_size} tensor-parallel ranks"
            )
        self.dims = dims
        self.num_heads = dims.num_heads // tp_size
        self.fused_qkv_a_proj = MergedColumnParallelLinear(
            dims.hidden_size,
            [dims.q_lora_rank, dims.kv_lora_rank + dims.rope_dim],
            bias=False,
            quant_config=quant_config,
            disable_tp=True,
            prefix=f"{prefix}.fused_qkv_a_proj",
        )
        self.q_a_layernorm = RMSNorm(dims.q_lora_rank, eps=dims.rms_norm_eps)
        self.q_b_proj = ColumnParallelLinear(
            dims.q_lora_rank,
            dims.num_heads * (dims.nope_dim + dims.rope_dim),
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.q_b_proj",
        )
        self.kv_a_layernorm = RMSNorm(dims.kv_lora_rank, eps=dims.rms_norm_eps)
        self.kv_b_proj = ColumnParallelLinear(
            dims.kv_lora_rank,
            dims.num_heads * (dims.nope_dim + dims.v_dim),
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.kv_b_proj",
        )
        self.o_proj = RowParallelLinear(
            dims.num_heads * dims.v_dim,
            dims.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.indexer = Indexer(dims, quant_config, f"{prefix}.indexer")
        # Only its table is used: both rotations, interleaved and halves, share the angles. In float32:
        # get_rope's default, the model's dtype, would round every cosine to eight bits.
        self.rotary_emb = get_rope(
            dims.rope_dim,
            max_position=dims.max_position,
            is_neox_style=False,
            rope_parameters=dict(dims.rope_parameters),
            dtype=torch.float32,
        )
        self.attn = SparseAttention(
            dims,
            self.num_heads,
            self.kv_a_layernorm,
            self.kv_b_proj,
            self.indexer.k_norm,
            self.indexer.join_weights,
            topk_indices_buffer,
            f"{prefix}.attn",
        )

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """``[T]`` and ``[T, hidden]`` to ``[T, hidden]``, reduced over the tensor-parallel ranks."""
        dims = self.dims
        q_c, kv_c, k_pe = self.fused_qkv_a_proj(hidden_states)[0].split(
            [dims.q_lora_rank, dims.kv_lora_rank, dims.rope_dim], dim=-1
        )
        q_c = self.q_a_layernorm(q_c)
        q = self.q_b_proj(q_c)[0].view(-1, self.num_heads, dims.nope_dim + dims.rope_dim)
        index_q, index_k, head_weights = self.indexer(hidden_states, q_c)
        output = hidden_states.new_empty((hidden_states.shape[0], self.num_heads * dims.v_dim))
        self.attn(
            positions,
            self.rotary_emb.cos_sin_cache,
            q,
            kv_c,
            k_pe,
            index_q,
            index_k,
            head_weights,
            output,
        )
        return self.o_proj(output)[0]
