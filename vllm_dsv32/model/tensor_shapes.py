"""The shape of every tensor of a DeepSeek-V3.2 checkpoint, by its configuration."""

import re
from typing import Any

import torch

from vllm_dsv32.config import ModelDims
from vllm_dsv32.errors import CheckpointError

__all__ = ["TensorShapes"]


class TensorShapes:
    """Checks tensors before they reach a loader that would silently narrow or broadcast them."""

    def __init__(self, config: Any) -> None:
        """Args: config: the checkpoint's."""
        self._modules = _module_shapes(config)
        quantization = getattr(config, "quantization_config", None) or {}
        self._block = quantization.get("weight_block_size")
        # In other formats a weight is packed, and its shape is that format's business.
        self._known_format = not quantization or (
            quantization.get("quant_method") == "fp8" and self._block is not None
        )

    def check(self, name: str, tensor: torch.Tensor) -> None:
        """Compare a tensor with the configuration.

        Raises:
            CheckpointError: its shape is another one.
        """
        expected = self.expected(name)
        if expected is not None and tuple(tensor.shape) != expected:
            raise CheckpointError(
                f"misshapen tensor {name}: config.json makes it {expected}, the checkpoint has "
                f"{tuple(tensor.shape)}"
            )

    def expected(self, name: str) -> tuple[int, ...] | None:
        """The shape that the configuration gives a tensor; None where it does not say."""
        module, _, kind = re.sub(r"\.experts\.\d+\.", ".experts.*.", name).rpartition(".")
        shape = self._modules.get(re.sub(r"^model\.layers\.\d+\.", "", module))
        if shape is None or not self._known_format:
            return None
        if kind == "weight":
            return shape
        if kind in ("bias", "e_score_correction_bias"):
            return shape[:1]
        if kind == "weight_scale_inv" and self._block is not None:
            return tuple(-(-extent // block) for extent, block in zip(shape, self._block, strict=True))
        return None


def _module_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """``[out, in]`` of each linear layer, extents of each norm and embedding; layers without their number."""
    dims = ModelDims.from_hf_config(config)
    hidden, heads = dims.hidden_size, dims.num_heads
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (config.vocab_size, hidden),
        "model.norm": (hidden,),
        "lm_head": (config.vocab_size, hidden),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_a_proj": (dims.q_lora_rank, hidden),
        "self_attn.q_a_layernorm": (dims.q_lora_rank,),
        "self_attn.q_b_proj": (heads * (dims.nope_dim + dims.rope_dim), dims.q_lora_rank),
        "self_attn.kv_a_proj_with_mqa": (dims.kv_lora_rank + dims.rope_dim, hidden),
        "self_attn.kv_a_layernorm": (dims.kv_lora_rank,),
        "self_attn.kv_b_proj": (heads * (dims.nope_dim + dims.v_dim), dims.kv_lora_rank),
        "self_attn.o_proj": (hidden, heads * dims.v_dim),
        "self_attn.indexer.wq_b": (dims.num_index_heads * dims.index_head_dim, dims.q_lora_rank),
        "self_attn.indexer.wk": (dims.index_head_dim, hidden),
        "self_attn.indexer.k_norm": (dims.index_head_dim,),
        "self_attn.indexer.weights_proj": (dims.num_index_heads, hidden),
        # Of the draft layer only:
        "embed_tokens": (config.vocab_size, hidden),
        "enorm": (hidden,),
        "hnorm": (hidden,),
        "eh_proj": (hidden, 2 * hidden),
        "shared_head.norm": (hidden,),
        "shared_head.head": (config.vocab_size, hidden),
    }
    shapes |= _mlp_shapes("mlp", hidden, config.intermediate_size)
    if config.n_routed_experts is not None:
        shared = config.moe_intermediate_size * (config.n_shared_experts or 0)
        shapes |= _mlp_shapes("mlp.experts.*", hidden, config.moe_intermediate_size)
        shapes |= _mlp_shapes("mlp.shared_experts", hidden, shared)
        shapes["mlp.gate"] = (config.n_routed_experts, hidden)
    return shapes


def _mlp_shapes(prefix: str, hidden: int, intermediate: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.gate_proj": (intermediate, hidden),
        f"{prefix}.up_proj": (intermediate, hidden),
        f"{prefix}.down_proj": (hidden, intermediate),
    }
