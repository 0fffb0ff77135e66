"""DeepSeek-V3.2: decoder layers, the model, and the language-model head."""

from collections.abc import Callable, Iterable
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.deepseek_v2 import DeepseekV2MixtureOfExperts, DeepseekV2MLP, DeepseekV2MoE
from vllm.model_executor.models.interfaces import SupportsPP
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors

from vllm_dsv32.config import ModelDims
from vllm_dsv32.model.mla import Dsv32Attention
from vllm_dsv32.model.weights import FUSED, load_checkpoint

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["Dsv32DecoderLayer", "Dsv32ForCausalLM", "Dsv32MoEModel", "make_topk_indices_buffer"]


def make_topk_indices_buffer(vllm_config: "VllmConfig", dims: ModelDims) -> torch.Tensor:
    """The scratch that all layers select slots into, int32 ``[max_num_batched_tokens, K]``."""
    shape = (vllm_config.scheduler_config.max_num_batched_tokens, dims.topk)
    return torch.empty(shape, dtype=torch.int32, device=vllm_config.device_config.device)


class Dsv32DecoderLayer(torch.nn.Module):
    """Sparse attention, then experts or a dense MLP, each behind a norm and around the residual."""

    def __init__(
        self,
        vllm_config: "VllmConfig",
        dims: ModelDims,
        topk_indices_buffer: torch.Tensor,
        prefix: str,
    ) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        quant_config = vllm_config.quant_config
        layer_index = int(prefix.rsplit(".", 1)[-1])
        self.self_attn = Dsv32Attention(dims, quant_config, topk_indices_buffer, f"{prefix}.self_attn")
        self.mlp: DeepseekV2MoE | DeepseekV2MLP
        if layer_index >= config.first_k_dense_replace:
            self.mlp = DeepseekV2MoE(
                config=config,
                parallel_config=vllm_config.parallel_config,
                quant_config=quant_config,
                prefix=f"{prefix}.mlp",
                apply_routed_scale_to_output=True,
            )
        else:
            self.mlp = DeepseekV2MLP(
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                hidden_act=config.hidden_act,
                quant_config=quant_config,
                prefix=f"{prefix}.mlp",
            )
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the layer's contribution and the residual it is to be added to, each ``[T, hidden]``."""
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions, hidden_states)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


class Dsv32Model(torch.nn.Module):
    """Embedding, this pipeline stage's layers, final norm."""

    def __init__(self, *, vllm_config: "VllmConfig", prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        dims = ModelDims.from_hf_config(config)
        # vLLM hands this buffer to the draft model, under this name.
        self.topk_indices_buffer = make_topk_indices_buffer(vllm_config, dims)
        self.embed_tokens: torch.nn.Module = PPMissingLayer()
        if get_pp_group().is_first_rank:
            self.embed_tokens = VocabParallelEmbedding(
                config.vocab_size,
                config.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=f"{prefix}.embed_tokens",
            )
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: Dsv32DecoderLayer(vllm_config, dims, self.topk_indices_buffer, prefix),
            prefix=f"{prefix}.layers",
        )
        self.norm: torch.nn.Module = PPMissingLayer()
        if get_pp_group().is_last_rank:
            self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """``[T]`` tokens (or ``[T, hidden]`` embeddings) to ``[T, hidden]``, or to the next stage's input."""
        residual: torch.Tensor | None = None
        if intermediate_tensors is not None:
            hidden_states, residual = intermediate_tensors["hidden_states"], intermediate_tensors["residual"]
        else:
            hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            hidden_states, residual = layer(positions, hidden_states, residual)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden_states, "residual": residual})
        hidden_states, _ = self.norm(hidden_states, residual)
        return hidden_states


class Dsv32MoEModel(torch.nn.Module, SupportsPP, DeepseekV2MixtureOfExperts):
    """What vLLM's pipeline parallelism and expert load balancing ask of both models, main and draft."""

    packed_modules_mapping: ClassVar = FUSED
    config: Any
    make_empty_intermediate_tensors: Callable[..., IntermediateTensors]

    def _init_hooks(self, vllm_config: "VllmConfig") -> None:
        """Call once the layers are built."""
        config = self.config
        # A checkpoint must be complete; updates of weights that are there need not be.
        self._has_weights = vllm_config.load_config.load_format == "dummy"
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], config.hidden_size
        )
        experts = [
            layer.mlp
            for layer in self.modules()
            if isinstance(layer, Dsv32DecoderLayer) and isinstance(layer.mlp, DeepseekV2MoE)
        ]
        self.moe_mlp_layers = experts
        self.moe_layers = [moe.experts for moe in experts]
        self.num_moe_layers = len(experts)
        self.num_expert_groups = getattr(config, "n_group", 1)
        if experts:
            DeepseekV2MixtureOfExperts.extract_moe_parameters(self, experts[-1])

    def _load(
        self,
        weights: Iterable[tuple[str, torch.Tensor]],
        checkpoint_name: Callable[[str], str],
        belongs_here: Callable[[int | None], bool],
    ) -> set[str]:
        loaded = load_checkpoint(
            self, self.config, weights, checkpoint_name, belongs_here, partial=self._has_weights
        )
        self._has_weights = True
        return loaded


class Dsv32ForCausalLM(Dsv32MoEModel):
    """DeepSeek-V3.2 with its head, as vLLM runs it."""

    def __init__(self, *, vllm_config: "VllmConfig", prefix: str = "") -> None:
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        self.quant_config = vllm_config.quant_config
        self.model = Dsv32Model(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head: torch.nn.Module = PPMissingLayer()
        if get_pp_group().is_last_rank:
            self.lm_head = ParallelLMHead(
                self.config.vocab_size,
                self.config.hidden_size,
                quant_config=self.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
        self.logits_processor = LogitsProcessor(self.config.vocab_size)
        self._init_hooks(vllm_config)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """``[T]`` to ``[T, hidden]``."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """See :meth:`Dsv32Model.forward`."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """``[T, hidden]`` to ``[T, vocabulary]``; None off the rank that samples."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load DeepSeek's checkpoint; see :mod:`vllm_dsv32.model.weights`.

        Raises:
            CheckpointError: a tensor is missing, unexpected or misshapen.
        """
        first_draft_layer = self.config.num_hidden_layers
        return self._load(
            weights,
            checkpoint_name=lambda name: name,
            belongs_here=lambda layer: layer is None or layer < first_draft_layer,
        )
